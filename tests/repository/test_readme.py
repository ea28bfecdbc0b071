"""The README says what is true: its code runs, its folders exist, its commands are there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from efface.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo has run, as the quickstart expects."""
    folder = tmp_path_factory.mktemp("readme")
    assert main(["demo", "--scale", "smoke", "--out", str(folder / "demo-out")]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON, ids=[f"block {i}" for i in range(len(PYTHON))])
def test_python_blocks_run(code: str, demo: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=demo, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_quickstart_is_there() -> None:
    assert len(PYTHON) >= 2
    assert len(PYTHON[0].strip().splitlines()) <= 14


def test_the_map_names_folders_that_exist() -> None:
    folders = re.findall(r"^\| `([\w./-]+/)` \|", README, flags=re.MULTILINE)
    assert len(folders) >= 6
    for folder in folders:
        assert (ROOT / folder).is_dir(), folder


def test_commands_and_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^    make (\w+)", README, flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for command in re.findall(r"^efface ([\w-]+)", README, flags=re.MULTILINE):
        assert command in COMMANDS
