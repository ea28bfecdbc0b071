"""Tests of README.md: its Python code and its commands run, and the folders and make targets that it names exist."""

import re
from pathlib import Path

import pytest

from efface.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", PYTHON, ids=[f"block {i}" for i in range(len(PYTHON))])
def test_python_blocks_run(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks with the model where the demo would save it. ``test_demo`` runs the demo itself."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (folder / "demo-out").mkdir()
    (folder / "llama").rename(folder / "demo-out" / "full")
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})  # in this process, as in test_docs


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
