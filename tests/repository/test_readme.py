"""The README says what is true: its code runs, its folders exist, its commands are there."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def test_the_step_table_is_what_was_measured() -> None:
    """Every figure of README's table stands in the JSON file that it links to."""
    (link,) = re.findall(r"\[figures\]\((benchmarks/results/[\w.-]+-step\.json)\)", README)
    rows = {row["provider"]: row for row in json.loads((ROOT / link).read_text())["step"]}
    providers = {
        "padded, two forward passes, second model": "padded, two forwards, live",
        "padded, reference given": "padded, two forwards, cached",
        "efface, second model (`live`)": "efface, live",
        "efface, reference computed once (`cached`)": "efface, cached",
    }
    for label, provider in providers.items():
        row = rows[provider]
        assert f"| {label} | {row['median_ms']:.0f} | {row['faster_than_live']:.2f} |" in README, label


def test_the_pack_figures_are_what_was_measured() -> None:
    (link,) = re.findall(r"\[figures\]\((benchmarks/results/[\w.-]+-pack\.json)\)", README)
    rows = json.loads((ROOT / link).read_text())["packing"]
    told = " ".join(README.split())

    def found(task: str, provider: str) -> dict[str, Any]:
        return next(row for row in rows if row["task"].startswith(task) and row["provider"] == provider)

    tasks = [f"plan 1,000,000 forget x 4,000,000 retain, steps of {pairs}" for pairs in (32, 512)]
    plan, many, pack = (found(task, "NumPy and Python")["against_efface"] for task in (*tasks, "assemble"))
    times = [found(task, "efface plan_epoch")["median_ms"] for task in tasks]
    micro = found("assemble", "efface pack_items")["median_ms"] * 1e3
    assert (
        f"takes {times[0]:.0f} ms, assembling a batch of 8192 tokens {micro:.0f} µs: {plan:.0f} and {pack:.0f} times"
        in told
    )
    assert f"planning takes {times[1]:.0f} ms, {many:.0f} times faster" in told


def test_commands_and_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^    make (\w+)", README, flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for command in re.findall(r"^efface ([\w-]+)", README, flags=re.MULTILINE):
        assert command in COMMANDS
