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
from types import ModuleType
from typing import Any

import pytest

from efface.cli.main import EXIT_CODES, main

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_made" not in path.parts)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """Language and code of the blocks in these languages, in the order of the page."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(language, code) for language, code in found if language in languages]


def command_lines(code: str) -> list[str]:
    return [line for line in code.replace("\\\n", " ").splitlines() if line.strip()]


def words(line: str) -> list[str]:
    """The words behind ``efface`` in a command line, without a launcher of processes."""
    parts = shlex.split(line, comments=True)
    return parts[parts.index("efface") + 1 :]


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "sh", "python")],
    ids=lambda page: str(page.relative_to(ROOT / "docs")),
)
def test_the_code_of_a_page_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block in the order of the page; the Python of a page shares its names."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names: dict[str, Any] = {"__name__": "__main__"}
    for language, code in blocks(page, "sh", "python"):
        if language == "python":  # in this process, because a new one would spend seconds on imports
            exec(compile(code, str(page), "exec"), names)
            continue
        for line in command_lines(code):
            assert main(words(line)) == 0, line


def test_every_sh_line_is_a_command_of_efface() -> None:
    for page in PAGES:
        for _, code in blocks(page, "sh"):
            for line in command_lines(code):
                assert "efface " in line, f"{page}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_code_is_narrower_than_its_column(page: Path) -> None:
    lines = "".join(code for _, code in blocks(page, "sh", "python", "text", "yaml", "json")).splitlines()
    assert [line for line in lines if len(line) > 88] == []


def test_the_index_leads_to_every_page() -> None:
    """Its table names every page of the sidebar, by the question that it answers; the decisions have an index."""
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    table, sidebar = index.split("```{toctree}", 1)
    listed = set(re.findall(r"^(\w[\w/-]*)$", sidebar, flags=re.MULTILINE))
    assert set(re.findall(r"{doc}`([\w/-]+)`", table)) == listed
    assert sidebar.count(":hidden:") == sidebar.count(":maxdepth:")
    pages = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in PAGES}
    assert {page for page in pages if not page.startswith("decisions/")} <= listed | {"index"}


# ---- links


@pytest.fixture(scope="module")
def links() -> ModuleType:
    """``docs/links.py``, which ``make docs`` runs."""
    spec = importlib.util.spec_from_file_location("links", ROOT / "docs" / "links.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_link_resolves(links: ModuleType) -> None:
    assert links.dead_links() == []


def test_pages_with_links_are_found(links: ModuleType) -> None:
    names = {str(page.relative_to(ROOT)) for page in links.pages()}
    assert {"README.md", "docs/index.md", "engine/efface/objectives/README.md", "benchmarks/gpu/README.md"} <= names


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[a](b.md)", None),
        ("[a](b.md#a-heading-with-code-twice)", None),
        ("[a](b.md#a-heading-with-code-twice-1)", None),
        ("[a](#here)", None),
        ("[a](b.md#a-label)", None),
        ('[a](../README.md "title") and ![picture](_made/memory.svg)', None),
        ("[a](https://arxiv.org/abs/2401.06121) and <https://example.org/a_(b)>", None),
        ("{doc}`b`, {doc}`text <b>`, {doc}`/b`, {ref}`a-label`", None),
        ("`[a](gone.md)` and ``x` [a](gone.md)``", None),
        ("```text\n[a](gone.md)\n```", None),
        ("[a](gone.md)", "got nothing at docs/gone.md"),
        ("[a](b.md#gone)", "expected a heading or label in docs/b.md"),
        ("[a](#gone)", "expected a heading or label in docs/a.md"),
        ("![picture](gone.png)", "got nothing at docs/gone.png"),
        ("[a]: gone.md", "got nothing at docs/gone.md"),
        ('<img src="gone.png">', "got nothing at docs/gone.png"),
        ("[a](../../elsewhere.md)", "expected a path inside the checkout"),
        ("[a](http:/example.org)", "expected https://host/path"),
        ("[a](https://localhost)", "expected https://host/path"),
        ("[a](ftp://example.org)", "expected https://host/path"),
        ("[a]()", "expected a target, got none"),
        ("{doc}`gone`", "got no file docs/gone.md"),
        ("{doc}`text <../gone>`", "got no file gone.md"),
        ("{ref}`gone`", "expected a label of docs/"),
    ],
)
def test_dead_links_are_found(links: ModuleType, tmp_path: Path, text: str, fault: str | None) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# Title\n")
    heading = "## A heading, with `code`: *twice*\n"
    (tmp_path / "docs" / "b.md").write_text(f"# B\n\n{heading}\n{heading}\n(a-label)=\n\n## [C](b.md)\n")
    (tmp_path / "docs" / "a.md").write_text(f"# Here\n\n{text}\n")
    found = links.dead_links(tmp_path)
    if fault is None:
        assert found == []
    else:
        (message,) = found
        assert message.startswith("docs/a.md:3: ")
        assert message.endswith(fault) or fault in message


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
