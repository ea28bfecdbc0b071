"""Tests of the times expected on a GPU: the chunks and launches are those of the loss."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmarks.__main__
import pytest
import torch
from benchmarks.publish import page, tables
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks import expected, one_chunk
from efface_kernels import (
    Head,
    Kind,
    ReferenceRows,
    RowOffsets,
    SequenceRule,
    Term,
    linear_distribution_loss,
    linear_sequence_loss,
    memory,
    triton_launch,
)
from efface_kernels.linear_loss import chunks, look

ROOT = Path(__file__).resolve().parents[2]

# The range check of the targets runs only on the CPU; autograd creates the root of a backward call.
NOT_OURS = {"aminmax", "_local_scalar_dense", "ones_like"}
NO_LAUNCH = ("empty", "new_empty", "detach", "lift_fresh")


class Launches(TorchDispatchMode):
    """Counts the operations that launch a kernel: torch's ops except views and allocations, and Triton's launches."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(NO_LAUNCH):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], tuple[Any, Counter[str]]]:
    """Return a function that counts the launches of a call as on a GPU whose GEMM can add in fp32."""
    pytest.importorskip("triton")
    if not triton_launch.INTERPRETED:
        pytest.skip("counts the launches of the interpreter")
    from triton.runtime import interpreter

    seen: list[Counter[str]] = []

    # kernels are not run, because their results do not affect the launches
    def noted(self: Any, *_: Any, **__: Any) -> None:
        seen[-1][self.fn.__name__] += 1

    def add_in_gemm(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
        seen[-1]["mm"] += 1
        with _disable_current_modes():
            product = left.float() @ right.float()
            total.copy_(product if first else total + product)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", noted)
    monkeypatch.setattr(memory, "accumulates_in_float32", lambda *_: True)
    monkeypatch.setattr(memory, "_add_in_gemm", add_in_gemm)

    def run(function: Callable[[], Any]) -> tuple[Any, Counter[str]]:
        with Launches() as mode:
            seen.append(mode.counts)
            result = function()
        return result, Counter({name: n for name, n in mode.counts.items() if name not in NOT_OURS})

    return run


@pytest.mark.filterwarnings("ignore")  # NumPy warns of the interpreter's inexact bf16
@pytest.mark.parametrize("chunk_rows", [128, 256])
@pytest.mark.parametrize(
    ("mode", "in_turn"), [("live", False), ("live", True), ("cached", False), ("frozen, cached", False)]
)
def test_launches_are_those_of_a_call(
    mode: str, chunk_rows: int, in_turn: bool, count: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (look, expected):
        monkeypatch.setattr(module, "shares_workspace", lambda *_: in_turn)
    n, d, v = 256, 8, 50
    hidden, weight = (torch.randn(size, d, dtype=torch.bfloat16).requires_grad_() for size in (n, v))
    weight.requires_grad_(mode != "frozen, cached")
    host = torch.arange(0, n + 1, 32)
    sequences = len(host) - 1
    rule = SequenceRule.of(torch.zeros(sequences, dtype=torch.int8), {0: Term(Kind.NPO, 1 / sequences)})
    frozen = ReferenceRows(hidden.detach() + 1, Head(weight.detach() + 1))

    def loss() -> Tensor:
        return linear_sequence_loss(
            hidden,
            weight,
            torch.zeros(n, dtype=torch.int64),
            RowOffsets(host, host.clone()),
            rule,
            reference=frozen if mode == "live" else None,
            reference_sums=None if mode == "live" else torch.zeros(sequences),
            chunk_rows=chunk_rows,
            backend="triton",
        ).loss

    def gradients() -> Any:
        return torch.autograd.grad(value, [each for each in (hidden, weight) if each.requires_grad])

    # fmt: off
    value, forward = count(loss)
    _, backward = count(gradients)
    seen = {
        "GEMM": forward.pop("mm"), "row pass": forward.pop("row_pass_kernel"),
        "keep": forward.pop("copy_"), "sequence loss": forward.pop("sequence_loss_kernel"),
        "f = -c": forward.pop("neg"), "f h": forward.pop("mul", 0), "loss": forward.pop("sum"),
        "finish of dh": backward.pop("mul"), "finish of dW": backward.pop("scale_kernel", 0),
    }
    forward -= Counter(zeros=1 if mode == "live" else 2, clone=1)
    found = expected.expected(expected.HeadShape("tiny", d, v, n), mode, None, chunk_rows)
    assert seen == {name: n for name, n in found.launches.items() if name not in ("distribution pass", "c = -w")}
    assert not +forward
    assert not +backward
    assert found.gemms == seen["GEMM"]
    assert len(found.chunks) == n // chunk_rows


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chunk_rows", [128, 256])
def test_launches_are_those_of_a_call_for_kl(chunk_rows: int, count: Any) -> None:
    n, d, v = 256, 8, 50
    hidden, weight = (torch.randn(size, d, dtype=torch.bfloat16).requires_grad_() for size in (n, v))
    frozen = ReferenceRows(hidden.detach() + 1, Head(weight.detach() + 1))
    targets, weights = torch.zeros(n, dtype=torch.int64), torch.ones(n)
    loss, forward = count(
        lambda: (
            linear_distribution_loss(
                hidden, weight, targets, weights, frozen, chunk_rows=chunk_rows, backend="triton"
            ).loss
        )
    )
    _, backward = count(lambda: torch.autograd.grad(loss, (hidden, weight)))
    found = expected.expected(expected.HeadShape("tiny", d, v, n), expected.KL, None, chunk_rows)
    of = {name: launches for name, launches in found.launches.items() if launches}
    assert forward.pop("mm") == of["GEMM"] == found.gemms
    assert forward.pop("distribution_pass_kernel") == of["distribution pass"]
    assert forward.pop("copy_") == of["keep"] + len(found.chunks)  # on the CPU P is copied to be contiguous
    assert forward.pop("neg") == of["c = -w"] + of["f = -c"]
    assert forward.pop("mul") + forward.pop("sum") == of["f h"] + of["loss"]
    forward.pop("_to_copy")  # heads and hidden states are converted to fp32 only on the CPU
    assert not forward
    assert backward == Counter(mul=of["finish of dh"], scale_kernel=of["finish of dW"])


def test_the_table_uses_the_chunks_of_the_loss() -> None:
    h100, h200 = expected.CARDS
    small, _, seven, _ = expected.SHAPES
    assert expected.expected(small, "live", 24 << 30).chunks == (2048,) * 4
    assert expected.expected(small, "live", h100.memory).chunks == (4096,) * 2
    assert expected.expected(small, "live", h200.memory).chunks == (8192,)
    assert expected.expected(seven, "cached", 24 << 30).chunks == (8192,)
    assert expected.expected(small, "live", None, chunk_rows=1100).chunks == (1024,) * 8
    # bytes moved for dW: with two chunks 14 per entry, minus the bf16 results of the GEMMs; with one chunk 0
    found = expected.expected(small, "cached", h100.memory)
    entries = 2048 * 128256
    assert found.moved["sum of dW"] == (4 + 8 - 2 * 2) * entries
    assert found.moved["finish of dW"] == 6 * entries
    assert expected.expected(small, "cached", h200.memory).moved["sum of dW"] == 0
    assert found.flop == 3 * 2 * 8192 * 2048 * 128256
    # KL: fp32 logits of both models are read twice, and P in bf16 overwrites the reference's
    found = expected.expected(small, expected.KL, h100.memory)
    assert found.chunks == (2048,) * 4
    assert found.moved["distribution pass"] == 18 * 8192 * 128256
    assert found.flop == 4 * 2 * 8192 * 2048 * 128256
    assert expected.expected(seven, expected.KL, h200.memory).chunks == (8192,)


def test_one_chunk_in_the_table_is_one_chunk_of_the_loss() -> None:
    n, d, v = 2048 + 2048, 2048, 128256
    chosen = expected.expected(expected.HeadShape("", d, v, n), "cached", None).chunks
    assert chosen == (n,)
    assert chunks.one_chunk_is_smaller(n, 2048, (v, d), lambda rows: rows * v * 2)
    assert len(expected.expected(expected.HeadShape("", d, v, n + 32), "cached", None).chunks) == 3


def test_the_page_contains_the_computed_table() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    table = tables.markdown(expected.HEADINGS, expected.table())
    assert table in text, "run `python -m benchmarks report`"
    assert expected.assumptions() in text
    assert "**Computed, not measured**" in page([], {})
    assert len(expected.table()) == len(expected.CARDS) * len(expected.SHAPES) * len(expected.MODES)


def test_the_kernels_readme_has_the_memory_that_is_computed() -> None:
    text = (ROOT / "kernels" / "efface_kernels" / "linear_loss" / "README.md").read_text(encoding="utf-8")
    assert tables.markdown(expected.MEMORY_HEADINGS, expected.memory_table()) in text, "python -m benchmarks expected"
    by_name = {row[0]: row[2:] for row in expected.memory_table()}
    assert by_name["24 GiB, 2048 x 128256"] == ["501", "1002", "1002"]
    assert by_name["139 GiB, 2048 x 128256"] == ["2004", "0", "2004"]


def test_the_commands_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["python -m benchmarks", "expected"])
    assert benchmarks.__main__.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("not measured") == 2
    assert "H200, 2048 x 128256, live" in printed
    one_chunk.main(64, 8, 97, rounds=1)
    assert capsys.readouterr().out.count("the time of several chunks") == 2
