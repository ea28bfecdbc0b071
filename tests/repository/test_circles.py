"""No two modules of the kernels and objectives import each other, directly or by a detour."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREES = {"efface_kernels": ROOT / "kernels", "efface.objectives": ROOT / "engine"}


def modules(root: Path, package: str) -> dict[str, Path]:
    """The modules of a package and its packages, by name; a package's own is its ``__init__``."""
    files = sorted((root / package.replace(".", "/")).rglob("*.py"))
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts) for path in files}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imported(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """What Python imports for an import anywhere in a module: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            # `from a import b` imports a.b where that is a module
            names = [f"{node.module}.{name.name}" for name in node.names]
            names = [name if name in known else node.module for name in names]
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))  # packages first


def graph(root: Path, package: str) -> dict[str, set[str]]:
    """What each module imports; not the packages that it is in, which are being imported already."""
    files = modules(root, package)
    edges = {}
    for name, path in files.items():
        found = set(imported(ast.parse(path.read_text(encoding="utf-8")), set(files))) & set(files)
        edges[name] = {other for other in found if not f"{name}.".startswith(f"{other}.")}
    return edges


@pytest.mark.parametrize("package", TREES)
def test_no_import_circle(package: str) -> None:
    edges = graph(TREES[package], package)
    assert sum(map(len, edges.values())) > len(edges)  # imports were found
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        pytest.fail(f"{package}: {' <- '.join(error.args[1])}")


def test_a_circle_is_found(tmp_path: Path) -> None:
    """Also one that is hidden: by TYPE_CHECKING, in a function, or by way of a package's ``__init__``."""
    files = {
        "top/__init__.py": "from top import one",
        "top/one.py": "import typing\nif typing.TYPE_CHECKING:\n    from top.two import b\n",
        "top/two.py": "def b():\n    from top import one\n",
        "top/pass_/__init__.py": "from top.pass_.op import run",
        "top/pass_/op.py": "from top.choice import choose",
        "top/pass_/launch.py": "",
        "top/choice.py": "from top.pass_.launch import x",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    edges = graph(tmp_path, "top")
    assert edges["top.one"] == {"top.two"}
    assert edges["top.two"] == {"top.one"}
    assert edges["top.choice"] == {"top.pass_", "top.pass_.launch"}
    for some in ({"top.one", "top.two"}, {"top.pass_", "top.pass_.op", "top.choice"}):
        with pytest.raises(CycleError):
            TopologicalSorter({name: edges[name] & some for name in some}).prepare()
