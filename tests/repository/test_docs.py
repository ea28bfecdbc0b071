"""Tests of docs/ (the code runs, links resolve, the pages build) and of the sdist and wheel (they build and import)."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from efface.cli.main import EXIT_CODES, main

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_made" not in path.parts)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


def commands(page: Path) -> list[list[str]]:
    """Return the words of every command line, without a process launcher such as torchrun."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[line.index("efface") + 1 :] for line in words if "efface" in line]


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if commands(page) or blocks(page, "python")],
    ids=lambda page: str(page.relative_to(ROOT / "docs")),
)
def test_the_code_of_a_page_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the page's commands first, then its Python code, which may use the files that the commands wrote."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for words in commands(page):
        assert main(words) == 0, words
    # in this process, because importing torch and transformers in a new one takes seconds
    exec(compile("\n".join(blocks(page, "python")), str(page), "exec"), {"__name__": "__main__"})


def test_every_sh_line_is_a_command_of_efface() -> None:
    for page in PAGES:
        lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
        for line in filter(str.strip, lines):
            assert "efface " in line, f"{page}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_code_is_narrower_than_its_column(page: Path) -> None:
    for language in ("sh", "python", "text", "yaml", "json"):
        lines = "".join(blocks(page, language)).splitlines()
        assert [line for line in lines if len(line) > 88] == []


def test_the_index_leads_to_every_page() -> None:
    """The index lists the pages by the questions that they answer; it does not repeat the sidebar."""
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    table, sidebar = index.split("```{toctree}", 1)
    listed = set(re.findall(r"^(\w[\w/]*)$", sidebar, flags=re.MULTILINE))
    assert set(re.findall(r"{doc}`([\w/]+)`", table)) == listed
    assert sidebar.count(":hidden:") == sidebar.count(":maxdepth:")
    assert {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in PAGES} <= listed | {"index"}


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("sphinx") is None:
        pytest.skip("needs sphinx: pip install 'efface[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").is_file()
    pages = {page: page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    assert [
        page for page, text in pages.items() if re.search(r"<p>((?!</p>).)*\n: ", text, re.DOTALL)
    ] == []  # a definition, as it is written
    assert "<dl class=" in pages[tmp_path / "guides" / "trainer.html"]
    said = pages[tmp_path / "reference" / "commands.html"]
    assert all(f">{code}<" in said for code in EXIT_CODES)


# ---- the sdist and the wheel build, and work in an environment without this checkout


def run(*command: str | Path, cwd: Path, **more: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_sdist_and_wheel_build_and_import_in_a_clean_environment(tmp_path: Path) -> None:
    dist = tmp_path / "dist"
    # compile without optimisation, which takes half the time; the last -O option of a compiler takes effect
    compilers = {}
    for name, usual in (("CC", "cc"), ("CXX", "c++")):
        compilers[name] = str(tmp_path / usual)
        Path(compilers[name]).write_text(f'#!/bin/sh\nexec {os.environ.get(name, usual)} "$@" -O0\n')
        Path(compilers[name]).chmod(0o755)
    # the wheel is built from the sdist, so that a file missing from the sdist is noticed
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, ROOT, cwd=tmp_path, **compilers)
    (wheel,) = dist.glob("efface-*.whl")
    assert len(list(dist.glob("efface-*.tar.gz"))) == 1
    names = zipfile.ZipFile(wheel).namelist()
    assert "efface/__init__.py" in names
    assert "efface_kernels/linear_loss/README.md" in names
    templates = {path.name for path in (ROOT / "engine/efface/evaluate/report/templates").iterdir()}
    assert {f"efface/evaluate/report/templates/{name}" for name in templates} <= set(names)
    assert {"efface/recipes/tofu-npo.yaml", "efface/recipes/idk.txt"} <= set(names)
    assert any(name.startswith("efface_native.") for name in names)
    assert "efface_native-stubs/__init__.pyi" in names
    assert not any(name.startswith(("tests", "benchmarks", "csrc", "engine", "kernels/")) for name in names)

    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    # The dependencies come from this environment. Python does not process the .pth files of a folder that is itself
    # named in a .pth file, so the editable install of this checkout stays invisible.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = "import efface, efface_kernels as k, efface_native as n; print(efface.__file__, k.__file__, n.__file__)"
    places = run(python, "-c", code, cwd=tmp_path).split()
    assert all(place.startswith(str(site)) for place in places), places
    version = run(python, "-m", "efface", "--version", cwd=tmp_path)
    assert version.startswith("efface ")
    run(python, "-c", "import efface; efface.UnlearnTrainer, efface.evaluate.read_log", cwd=tmp_path)
