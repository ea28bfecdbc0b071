"""Tests of README.md: its Python code and its commands run, and the folders and make targets that it names exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import efface
from efface.cli.main import COMMANDS, main
from efface.simulate.authors import make_authors
from efface.simulate.fame import write_rows
from support.helpers import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SHELL = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def after_the_demo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put models and rows where the demo writes them. ``test_demo`` runs the demo itself."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (folder / "demo-out" / "data").mkdir(parents=True)
    for old, new in (("llama", "full"), ("retain90", "retain"), ("forget10.json", "data/forget.json")):
        (folder / old).rename(folder / "demo-out" / new)
    (folder / "retain90.json").rename(folder / "demo-out" / "data" / "retain.json")
    write_rows(make_authors(1)[:2], folder / "demo-out" / "data" / "forget_perturbed.json")
    return folder


@pytest.mark.parametrize("code", PYTHON, ids=[f"block {i}" for i in range(len(PYTHON))])
def test_python_blocks_run(code: str, after_the_demo: Path) -> None:
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})  # in this process, as in test_docs


def test_commands_run_as_pasted(after_the_demo: Path) -> None:
    lines = "".join(SHELL).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("efface ")]
    assert len(commands) == 3
    for words in commands:
        assert main(words) == 0, words
    assert (after_the_demo / "report.html").is_file()
    assert [line for line in lines if not line.startswith(("efface ", "pip install ", "export PATH="))] == []


def test_the_efface_line_equals_the_lines_that_it_replaces() -> None:
    """Run the diff before and after; the losses and the gradients are equal."""
    (diff,) = re.findall(r"```diff\n(.*?)```", README, flags=re.DOTALL)
    lines = diff.splitlines()
    assert {line[:2] for line in lines} == {"  ", "- ", "+ "}
    found = []
    for signs in ("  - ", "  + "):
        model = tiny_llama()
        ids = torch.randint(60, (3, 9), generator=torch.Generator().manual_seed(0))
        labels = ids.masked_fill(torch.arange(9) < 4, -100)
        names = {
            "model": model,
            "batch": {"input_ids": ids},
            "labels": labels,
            "beta": 0.1,
            "F": functional,
            "efface": efface,
        }
        names["reference"] = torch.tensor([-20.0, -19.0, -22.0])
        exec("\n".join(line[2:] for line in lines if line[:2] in (signs[:2], signs[2:])), names)
        found.append([names["loss"].detach(), *(weight.grad for weight in model.parameters())])
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-7)


def test_the_first_screen_is_short() -> None:
    assert len(README.splitlines()) <= 120
    assert len(PYTHON[0].strip().splitlines()) <= 14


def test_the_map_names_folders_that_exist() -> None:
    rows = re.findall(r"^\| (`[\w./`, -]+/`) \|", README, flags=re.MULTILINE)
    folders = re.findall(r"`([\w./-]+/)`", " ".join(rows))
    assert len(folders) >= 6
    for folder in folders:
        assert (ROOT / folder).is_dir(), folder


def test_commands_and_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^    make (\w+)", README, flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for command in re.findall(r"^efface ([\w-]+)", "".join(SHELL), flags=re.MULTILINE):
        assert command in COMMANDS
