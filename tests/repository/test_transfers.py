"""Nothing in a step makes the host wait for the device to take a list of numbers."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from efface.batching import TokenStore, pack
from efface_kernels import to_device

ROOT = Path(__file__).resolve().parents[2]

# What runs in a step: the loss, the objectives, the trainer and what it calls, the functional API.
STEP = ("kernels/efface_kernels", "engine/efface/objectives", "engine/efface/batching", "engine/efface/hf")
MODULES = [*(path for folder in STEP for path in (ROOT / folder).rglob("*.py")), ROOT / "engine/efface/functional.py"]
MADE_OF_HOST_NUMBERS = {"tensor", "as_tensor", "from_numpy", "frombuffer", "asarray"}

# (file, function) -> why it may wait
ALLOWED = {
    ("kernels/efface_kernels/backends.py", "_results"): "a device's first use, once",
    ("engine/efface/hf/model/packing.py", "_probes_in_a_pack"): "when a model is loaded",
    ("engine/efface/hf/reference/live.py", "check_start"): "before the first step",
    ("engine/efface/hf/train/meter.py", "read"): "when a log is written, which reads the device",
    ("engine/efface/hf/reference/cached.py", "__init__"): "from one dtype to another, on the host",
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
    """(function, line) of tensors made of the host's numbers that go to a device at once."""
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


def test_numbers_go_to_a_device_by_one_way() -> None:
    found = {(str(path.relative_to(ROOT)), name): line for path in MODULES for name, line in copies(path)}
    wrong = {f"{file}:{line} in {name}" for (file, name), line in found.items() if (file, name) not in ALLOWED}
    assert not wrong, "use efface_kernels.memory.to_device, or say in ALLOWED why it may wait"
    assert set(ALLOWED) <= set(found), "nothing is copied there any more"


def test_pinned_where_the_device_is_cudas(monkeypatch: pytest.MonkeyPatch) -> None:
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
