"""Tests of the source layout: allowed imports, no import cycles, a light ``import efface``, no host synchronisation."""

import ast
import importlib
import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest
import torch

import efface
import efface.hf
import efface_kernels
from efface.batching import TokenStore, pack
from efface_kernels import to_device

ROOT = Path(__file__).resolve().parents[2]

# folder -> packages that its code can import, in addition to the standard library
BASE = {"torch", "numpy", "efface_native", "efface_kernels"}
ALLOWED_IMPORTS: dict[str, set[str]] = {
    "kernels/efface_kernels": {"torch", "triton", "efface_native", "efface_kernels"},
    "engine/efface/batching": {*BASE, "efface.batching"},
    "engine/efface/objectives": {*BASE, "efface.registry", "efface.batching", "efface.objectives"},
    "engine/efface/reference": {*BASE, "efface.batching", "efface.keyed_store", "efface.reference"},
    "engine/efface/hf": {
        *BASE,
        *(
            "efface.batching",
            "efface.errors",
            "efface.extras",
            "efface.files",
            "efface.keyed_store",
            "efface.objectives",
            "efface.reference",
        ),
        "efface.hf",
        *(
            "accelerate",
            "transformers",
            "datasets",
            "tokenizers",
            "huggingface_hub",
            "safetensors",
            "jinja2",
            "pyarrow",
        ),
        "xxhash",
    },
    "engine/efface/evaluate": {
        *BASE,
        *("efface.registry", "efface.batching", "efface.hf", "efface.reference", "efface.evaluate"),
        *("efface.extras", "efface.files", "efface.keyed_store", "efface.processes"),
        *("accelerate", "transformers", "scipy", "rouge_score", "nltk"),
        *("jinja2", "markupsafe", "matplotlib", "yaml"),  # reports
    },
    "engine/efface/recipes": {
        *BASE,
        *("efface.registry", "efface.batching", "efface.objectives", "efface.hf", "efface.evaluate", "efface.recipes"),
        *("efface.errors", "efface.extras", "efface.flags", "accelerate", "transformers", "yaml"),
    },
    "engine/efface/simulate": {
        *BASE,
        *("efface.files", "efface.objectives", "efface.hf", "efface.evaluate", "efface.recipes", "efface.simulate"),
        *("transformers", "tokenizers", "datasets"),
    },
    "engine/efface/sweep": {
        *("efface.errors", "efface.extras", "efface.files", "efface.flags", "efface.hf"),
        *("efface.recipes", "efface.sweep", "optuna", "yaml"),
    },
    "engine/efface/cli": {
        *BASE,
        *("efface",),
        *("accelerate", "transformers", "datasets", "tokenizers", "rich", "shtab", "matplotlib", "yaml"),
    },
}


def imports(path: Path) -> Iterator[str]:
    """Yield the absolute name of every imported module, including imports inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module


@pytest.mark.parametrize("folder", ALLOWED_IMPORTS)
def test_nothing_imports_upward(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for module in imports(path):
            if module.split(".")[0] in sys.stdlib_module_names:
                continue
            allowed = any(module == name or module.startswith(name + ".") for name in ALLOWED_IMPORTS[folder])
            assert allowed, f"{path.relative_to(ROOT)} imports {module}"


def test_the_engine_takes_what_the_kernels_export() -> None:
    """The engine imports only names in ``efface_kernels.__all__``.

    Benchmarks measure single kernels, so they can also import kernels, launch configurations and chunk plans.
    """
    exported = set(efface_kernels.__all__)
    inside = re.compile(r"efface_kernels\.(jit|memory|triton_launch|backends|\w+\.(kernel|launch|chunks))")
    for path in [*(ROOT / "engine").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("efface_kernels.") for name in node.names), path
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module == "efface_kernels":
                taken = {name.name for name in node.names} - exported
                assert not taken or (path.is_relative_to(ROOT / "benchmarks") and taken == {"backends"}), path
            elif module is not None and module.startswith("efface_kernels."):
                assert path.is_relative_to(ROOT / "benchmarks"), path
                assert inside.fullmatch(module), f"{path}: {module}"


def test_every_package_lists_its_allowed_imports() -> None:
    for path in (ROOT / "engine" / "efface").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"engine/efface/{path.name}" in ALLOWED_IMPORTS


def test_the_source_roots_are_not_packages() -> None:
    """A top-level `kernels` package would shadow the Hub's `kernels`, which transformers imports."""
    assert not (ROOT / "engine" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_native_core_includes_neither_python_nor_torch() -> None:
    for path in (ROOT / "csrc").rglob("*.?pp"):
        text = path.read_text(encoding="utf-8")
        assert "pybind11" not in text
        assert "Python.h" not in text
        assert "torch" not in text
    assert "torch" not in (ROOT / "bindings" / "module.cpp").read_text(encoding="utf-8")


def test_modules_under_their_old_names_warn() -> None:
    """Modules that moved: the documented ones, and those that pickled files of old runs refer to."""
    assert efface.hf._MOVED.keys() >= {"loading", "token_cache", "open_unlearning", "arguments"}
    for old, new in efface.hf._MOVED.items():
        module = importlib.import_module(f"efface.hf.{new}")
        names = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        assert names
        moved = importlib.import_module(f"efface.hf.{old}")
        for name in names:
            with pytest.warns(DeprecationWarning, match=f"efface.hf.{old} has moved to efface.hf.{new}"):
                assert getattr(moved, name) is getattr(module, name)
    loading = importlib.import_module("efface.hf.loading")
    with pytest.warns(DeprecationWarning, match="loading"), pytest.raises(AttributeError, match="'nothing'"):
        _ = loading.nothing
    with pytest.warns(DeprecationWarning, match="efface.hf.train.arguments"):
        assert pickle.loads(b"cefface.hf.arguments\nUnlearnArguments\n.") is efface.UnlearnArguments


def test_importing_efface_is_light() -> None:
    """``import efface`` loads no heavy package, and its kernels do not import Triton before the first launch."""
    heavy = ("transformers.trainer", "matplotlib", "datasets", "scipy", "rich")
    code = (
        "import sys\n"
        "import efface\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "assert not [name for name in sys.modules if name.startswith('efface.')]\n"
        "assert set(efface.__all__) <= set(dir(efface))\n"
        "from efface import functional, get_objective\n"  # importing their modules registers the objectives
        "assert type(get_objective('npo')) is efface.NPO\n"
        "import torch\n"
        f"loaded = [name for name in {heavy!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
        "assert not torch.cuda.is_initialized()\n"
        "import efface_kernels.backends, efface_kernels.passes\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_of_efface_is_there() -> None:
    for name in efface.__all__:
        assert getattr(efface, name) is getattr(importlib.import_module("efface"), name)
    assert inspect.ismodule(efface.functional)
    assert pickle.loads(pickle.dumps(efface.NPO(beta=0.5))) == efface.NPO(beta=0.5)
    with pytest.raises(AttributeError, match="module 'efface' has no attribute 'nothing'"):
        _ = efface.nothing


@pytest.mark.parametrize(
    "module", [efface, efface.evaluate, efface.functional, efface.objectives, efface_kernels], ids=lambda m: m.__name__
)
def test_public_names_have_docstrings(module: ModuleType) -> None:
    """The linter asks for docstrings of modules alone; the public API has one for every class and function."""
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            first = (value.__doc__ or "").strip().partition("\n")[0]
            assert first.endswith((".", ":")), f"{module.__name__}.{name}: {first!r}"
            assert not first.startswith(f"{name}("), f"{module.__name__}.{name}: a dataclass without a docstring"


# ---- no import cycles


TREES = {"efface_kernels": ROOT / "kernels", "efface": ROOT / "engine"}


def modules(root: Path, package: str) -> dict[str, Path]:
    """Map the name of each module and package to its file; a package maps to its ``__init__.py``."""
    files = sorted((root / package.replace(".", "/")).rglob("*.py"))
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts) for path in files}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imported(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Yield every module that ``tree`` imports, including imports in functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            # `from a import b` imports a.b if a.b is a module
            names = [f"{node.module}.{name.name}" for name in node.names]
            names = [name if name in known else node.module for name in names]
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))  # the parent packages first


def graph(root: Path, package: str) -> dict[str, set[str]]:
    """Map each module to the modules that it imports, except its parent packages, which are already loading."""
    files = modules(root, package)
    edges = {}
    for name, path in files.items():
        found = set(imported(ast.parse(path.read_text(encoding="utf-8")), set(files))) & set(files)
        edges[name] = {other for other in found if not f"{name}.".startswith(f"{other}.")}
    return edges


def folders(edges: dict[str, set[str]]) -> dict[str, dict[str, set[str]]]:
    """Map each package to the imports between its direct modules and subpackages, each taken as a whole.

    The package's ``__init__`` is left out, because it imports its own parts to export them.
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


def cycle(edges: dict[str, set[str]]) -> str:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return " <- ".join(error.args[1])
    return ""


@pytest.mark.parametrize("package", TREES)
def test_no_import_cycle(package: str) -> None:
    edges = graph(TREES[package], package)
    assert sum(map(len, edges.values())) > len(edges)  # imports were found
    assert not cycle(edges)
    levels = folders(edges)
    assert package in levels
    assert not {level: found for level, imports in levels.items() if (found := cycle(imports))}


def test_no_two_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for package, root in TREES.items():
        for module, path in modules(root, package).items():
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(module)
    assert not {name: found for name, found in places.items() if len(found) > 1}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_cycle_is_found(tmp_path: Path) -> None:
    """Cycles through TYPE_CHECKING, through a function and through a package's ``__init__`` are found as well."""
    files = {
        "top/__init__.py": "from top import one",
        "top/one.py": "import typing\nif typing.TYPE_CHECKING:\n    from top.two import b\n",
        "top/two.py": "def b():\n    from top import one\n",
        "top/pass_/__init__.py": "from top.pass_.op import run",
        "top/pass_/op.py": "from top.choice import choose",
        "top/pass_/launch.py": "",
        "top/choice.py": "from top.pass_.launch import x",
    }
    edges = graph(tree(tmp_path, files), "top")
    assert edges["top.one"] == {"top.two"}
    assert edges["top.two"] == {"top.one"}
    assert edges["top.choice"] == {"top.pass_", "top.pass_.launch"}
    for some in ({"top.one", "top.two"}, {"top.pass_", "top.pass_.op", "top.choice"}):
        with pytest.raises(CycleError):
            TopologicalSorter({name: edges[name] & some for name in some}).prepare()


def test_a_cycle_of_packages_is_found(tmp_path: Path) -> None:
    """Two packages that import each other form a cycle even if their files do not."""
    files = {
        "top/__init__.py": "from top.one import a",
        "top/one/__init__.py": "",
        "top/one/a.py": "from top.two.b import x",
        "top/one/d.py": "",
        "top/two/__init__.py": "",
        "top/two/b.py": "from top.one.d import y",
    }
    edges = graph(tree(tmp_path, files), "top")
    assert cycle({name: others - {"top.one", "top.two"} for name, others in edges.items()}) == ""
    assert cycle(folders(edges)["top"]) in ("one <- two <- one", "two <- one <- two")


# ---- no step copies a list of numbers to the device in a way that makes the host wait


# Code that runs in a training step: the loss, the objectives, the trainer and what it calls, the functional API.
STEP = ("kernels/efface_kernels", "engine/efface/objectives", "engine/efface/batching", "engine/efface/hf")
MODULES = [*(path for folder in STEP for path in (ROOT / folder).rglob("*.py")), ROOT / "engine/efface/functional.py"]
MADE_OF_HOST_NUMBERS = {"tensor", "as_tensor", "from_numpy", "frombuffer", "asarray"}

# (file, function) -> why the copy can block there
ALLOWED = {
    ("kernels/efface_kernels/backends.py", "_results"): "once, at the first use of a device",
    ("engine/efface/hf/model/packing.py", "_probes_in_a_pack"): "when a model is loaded",
    ("engine/efface/hf/reference/live.py", "check_start"): "before the first step",
    ("engine/efface/hf/train/meter.py", "read"): "when a log entry is written, which reads device memory anyway",
    ("engine/efface/hf/reference/cached.py", "__init__"): "a dtype conversion on the host",
}


def _from_the_host(call: ast.AST) -> bool:
    return (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in MADE_OF_HOST_NUMBERS
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
    )


def copies(path: Path) -> Iterator[tuple[str, int]]:
    """Yield (function, line) of each tensor that is made from host numbers and copied to a device directly."""
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            named = _from_the_host(node) and any(
                keyword.arg == "device" and ast.unparse(keyword.value) != "'cpu'" for keyword in node.keywords
            )
            moved = (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in {"to", "cuda"}
                and any(_from_the_host(each) for each in ast.walk(node.func.value))
            )
            if named or moved:
                yield function.name, node.lineno


def test_host_numbers_go_to_a_device_through_to_device() -> None:
    found = {(str(path.relative_to(ROOT)), name): line for path in MODULES for name, line in copies(path)}
    wrong = {f"{file}:{line} in {name}" for (file, name), line in found.items() if (file, name) not in ALLOWED}
    assert not wrong, (
        "use efface_kernels.memory.to_device, or add the function to ALLOWED with the reason why it can wait"
    )
    assert set(ALLOWED) <= set(found), "remove the entries of ALLOWED that no longer copy to a device"


def test_to_device_pins_memory_for_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: seen.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *given, **more: seen.append((*given, more)) or self)
    for name in ("cuda", "cpu"):
        to_device(torch.arange(3), torch.device(name))
    later = {"non_blocking": True}
    assert seen == ["pinned", (torch.device("cuda"), later), (torch.device("cpu"), later)]


def test_a_batch_takes_its_offsets_along_once() -> None:
    store = TokenStore.from_sequences([[1, 2, 3], [4, 5]], [1, 1])
    batch = pack(store, store, [0], [1, 0])
    assert batch.label_offsets is batch.label_offsets
    assert batch.label_offsets.host.tolist() == list(batch.row_offsets)
    assert batch.retain_part().label_offsets.host.tolist() == list(batch.retain_part().row_offsets)
