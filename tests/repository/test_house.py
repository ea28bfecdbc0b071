"""The plan of the house: who may import whom, and what an import costs."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import efface_kernels

ROOT = Path(__file__).resolve().parents[2]

# folder -> third-party and own packages that its code may import, besides the standard library
BASE = {"torch", "numpy", "efface_native", "efface_kernels"}
FLOORS: dict[str, set[str]] = {
    "kernels/efface_kernels": {"torch", "triton", "efface_native", "efface_kernels"},
    "engine/efface/batching": {*BASE, "efface.batching"},
    "engine/efface/objectives": {*BASE, "efface.registry", "efface.batching", "efface.objectives"},
    "engine/efface/reference": {*BASE, "efface.batching", "efface.keyed_store", "efface.reference"},
    "engine/efface/hf": {
        *BASE,
        *("efface.batching", "efface.files", "efface.objectives", "efface.reference", "efface.hf"),
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
        *("efface.files", "efface.keyed_store", "efface.processes"),
        *("accelerate", "transformers", "scipy", "rouge_score", "nltk"),
        *("jinja2", "markupsafe", "matplotlib", "yaml"),  # reports
    },
    "engine/efface/recipes": {
        *BASE,
        *("efface.registry", "efface.batching", "efface.objectives", "efface.hf", "efface.evaluate", "efface.recipes"),
        *("accelerate", "transformers", "yaml"),
    },
    "engine/efface/simulate": {
        *BASE,
        *("efface.files", "efface.objectives", "efface.hf", "efface.evaluate", "efface.recipes", "efface.simulate"),
        *("transformers", "tokenizers", "datasets"),
    },
    "engine/efface/sweep": {"efface.files", "efface.hf", "efface.recipes", "efface.sweep", "optuna", "yaml"},
    "engine/efface/cli": {
        *BASE,
        *("efface",),
        *("accelerate", "transformers", "datasets", "tokenizers", "rich", "shtab", "matplotlib", "yaml"),
    },
}


def imports(path: Path) -> Iterator[str]:
    """Every absolute module name that the file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module


@pytest.mark.parametrize("folder", FLOORS)
def test_nothing_imports_upward(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for module in imports(path):
            if module.split(".")[0] in sys.stdlib_module_names:
                continue
            allowed = any(module == name or module.startswith(name + ".") for name in FLOORS[folder])
            assert allowed, f"{path.relative_to(ROOT)} imports {module}"


def test_the_engine_takes_what_the_kernels_export() -> None:
    """Benchmarks measure single kernels, and take launches and plans from inside."""
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


def test_every_package_stands_on_a_floor() -> None:
    for path in (ROOT / "engine" / "efface").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"engine/efface/{path.name}" in FLOORS


def test_the_source_roots_are_not_packages() -> None:
    """A top-level `kernels` package would shadow the Hub's `kernels`, which transformers imports."""
    assert not (ROOT / "engine" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_native_core_knows_neither_python_nor_torch() -> None:
    for path in (ROOT / "csrc").rglob("*.?pp"):
        text = path.read_text(encoding="utf-8")
        assert "pybind11" not in text
        assert "Python.h" not in text
        assert "torch" not in text
    assert "torch" not in (ROOT / "bindings" / "module.cpp").read_text(encoding="utf-8")


def test_importing_efface_is_light() -> None:
    heavy = ("transformers.trainer", "matplotlib", "datasets", "scipy", "rich")
    code = (
        "import sys, efface, torch\n"
        f"loaded = [name for name in {heavy!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
        "assert not torch.cuda.is_initialized()\n"
        "efface.NPO(), efface.functional\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
