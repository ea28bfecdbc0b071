"""No two modules or folders import each other, directly or by a detour; no two classes have one name."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREES = {"efface_kernels": ROOT / "kernels", "efface": ROOT / "engine"}


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


def folders(edges: dict[str, set[str]]) -> dict[str, dict[str, set[str]]]:
    """Of each package, what its modules and subpackages, each as a whole, import of one another.

    A package's own ``__init__`` is left out: it says what its parts are.
    """
    levels: dict[str, dict[str, set[str]]] = {}
    for name, others in edges.items():
        for other in others:
            mine, theirs = name.split("."), other.split(".")
            depth = next(i for i, part in enumerate(theirs) if mine[i : i + 1] != [part])
            if depth < len(mine):
                level = levels.setdefault(".".join(mine[:depth]), {})
                level.setdefault(mine[depth], set()).add(theirs[depth])
    return levels


def circle(edges: dict[str, set[str]]) -> str:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return " <- ".join(error.args[1])
    return ""


@pytest.mark.parametrize("package", TREES)
def test_no_import_circle(package: str) -> None:
    edges = graph(TREES[package], package)
    assert sum(map(len, edges.values())) > len(edges)  # imports were found
    assert not circle(edges)
    levels = folders(edges)
    assert package in levels
    assert not {level: found for level, imports in levels.items() if (found := circle(imports))}


def test_no_two_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for package, root in TREES.items():
        for module, path in modules(root, package).items():
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(module)
    assert not {name: found for name, found in places.items() if len(found) > 1}


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


def test_a_circle_of_folders_is_found(tmp_path: Path) -> None:
    """Also one of files that are in none."""
    files = {
        "top/__init__.py": "from top.one import a",
        "top/one/__init__.py": "",
        "top/one/a.py": "from top.two.b import x",
        "top/one/d.py": "",
        "top/two/__init__.py": "",
        "top/two/b.py": "from top.one.d import y",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    edges = graph(tmp_path, "top")
    assert circle({name: others - {"top.one", "top.two"} for name, others in edges.items()}) == ""
    assert circle(folders(edges)["top"]) in ("one <- two <- one", "two <- one <- two")
