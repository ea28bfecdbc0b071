"""Tests that need a GPU: bitwise repeatability, 64-bit offsets, no synchronisation, graph capture, peak memory.

The oracle tests of the passes and of the loss also run there: ``pytest -m gpu``.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from efface_kernels import (
    Head,
    Kind,
    Logits,
    ReferenceRows,
    RowOffsets,
    SequenceRule,
    Term,
    distribution_pass,
    linear_logprob,
    linear_sequence_loss,
    row_pass,
)
from efface_kernels.linear_loss.chunks import budget
from efface_kernels.memory import aligned
from efface_kernels.passes import scale_pass
from efface_kernels.row_pass.launch import launch_config, row_pass_triton

# They run in one process, because they use much of the memory and depend on how much is free.
pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("on_gpu")]

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _gpu() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with torch.device("cuda"):
        yield
    torch.cuda.empty_cache()


def needs_memory(size: int) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / GIB:.0f} GiB of free GPU memory, has {free / GIB:.0f}")


class Problem:
    """NPO with a live reference on the first half of the sequences, NLL on the rest."""

    def __init__(self, n: int, d: int, v: int, dtype: torch.dtype = torch.bfloat16, length: int = 32) -> None:
        self.hidden = torch.randn(n, d, dtype=dtype).requires_grad_()
        self.weight = (torch.randn(v, d, dtype=dtype) / d**0.5).requires_grad_()
        self.frozen_hidden, self.frozen_weight = torch.randn(n // 2, d, dtype=dtype), torch.randn(v, d, dtype=dtype)
        self.frozen_weight /= d**0.5
        self.targets = torch.randint(v, (n,))
        self.host = torch.arange(0, n + 1, length, device="cpu")
        self.offsets = RowOffsets(self.host, self.host.cuda())
        count = len(self.host) - 1
        roles = (torch.arange(count) >= count // 2).to(torch.int8)
        terms = {0: Term(Kind.NPO, 2 / count), 1: Term(Kind.NLL, 1 / n)}
        self.rule = SequenceRule.of(roles, terms)

    def loss(self, backend: str = "triton", chunk_rows: int | None = None) -> Tensor:
        return linear_sequence_loss(
            self.hidden,
            self.weight,
            self.targets,
            self.offsets,
            self.rule,
            reference=ReferenceRows(self.frozen_hidden, Head(self.frozen_weight)),
            chunk_rows=chunk_rows,
            backend=backend,
        ).loss

    def step(self, backend: str = "triton", chunk_rows: int | None = None) -> tuple[Tensor, ...]:
        loss = self.loss(backend, chunk_rows)
        return (loss.detach(), *torch.autograd.grad(loss, [self.hidden, self.weight]))


@pytest.mark.parametrize("chunk_rows", [None, 2048])  # as many rows as the card can process at once, or several chunks
@pytest.mark.parametrize("vocabulary", [50257, 128256])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_same_inputs_give_the_same_bits(backend: str, vocabulary: int, chunk_rows: int | None) -> None:
    needs_memory(16 * GIB)
    problem = Problem(4096, 256, vocabulary)
    first = problem.step(backend, chunk_rows)
    for _ in range(3):
        for one, two in zip(problem.step(backend, chunk_rows), first, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("chunk_rows", [None, 2048])
def test_triton_agrees_with_torch(chunk_rows: int | None) -> None:
    needs_memory(16 * GIB)
    problem = Problem(4096 + 64, 128, 128256)
    for got, want in zip(problem.step(chunk_rows=chunk_rows), problem.step("torch", chunk_rows), strict=True):
        error = (got.double() - want.double()).square().mean().sqrt()
        assert error <= 4e-3 * want.double().square().mean().sqrt()


@pytest.mark.parametrize("op", ["row", "distribution"])
def test_offsets_beyond_int32(op: str) -> None:
    """17000 rows of V = 128256 are 2.2e9 entries. The last rows must equal the same rows alone."""
    rows, v = 17000, 128256
    needs_memory(14 * GIB)
    logits = torch.empty(rows, v, dtype=torch.bfloat16).normal_()
    targets = torch.randint(v, (rows,))
    last = slice(rows - 8, rows)
    alone = logits[last].clone()

    def run(z: Tensor, where: slice) -> Tensor:
        if op == "row":
            return row_pass(z, targets[where], backend="triton").logprobs
        return distribution_pass(z, z.clone(), targets[where], shift=2.0, backend="triton").divergence

    whole, some = run(logits, slice(None)), run(alone, last)
    assert torch.equal(whole[last], some)
    assert torch.equal(logits[last], alone)


@pytest.mark.parametrize("vocabulary", [7, 50257, 128256])
def test_persistent_programs_equal_one_a_row(vocabulary: int) -> None:
    rows = 2000  # many rows per program, and a last iteration for only some programs
    logits = (3 * torch.randn(rows, vocabulary)).bfloat16()
    targets, frozen = torch.randint(vocabulary, (rows,)), logits[: rows // 2].clone()
    results = []
    for persistent in (False, True):
        z = logits.clone()
        config = launch_config(vocabulary, z.dtype, frozen.dtype, persistent=persistent)
        results.append((z, *row_pass_triton(Logits(z), targets, Logits(frozen), True, config)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=torch.finfo(one.dtype).eps, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [7, 2048, 50257, 128256])
def test_p_over_the_references_logits_equals_p_elsewhere(vocabulary: int) -> None:
    """Warps that run ahead must not overwrite what others still have to read. All rows, 20 times, the same bits."""
    rows = 512
    logits = torch.randn(rows, vocabulary)
    frozen, targets = logits + torch.randn(rows, vocabulary) / 32, torch.randint(vocabulary, (rows,))
    apart = torch.empty(rows, vocabulary, dtype=torch.bfloat16)
    expected = distribution_pass(logits, frozen, targets, out=apart, backend="triton")
    padded = aligned(rows, vocabulary, torch.float32, logits.device)
    for _ in range(20):
        over = padded.copy_(frozen).view(torch.bfloat16)[:, :vocabulary]
        got = distribution_pass(logits, padded, targets, out=over, backend="triton")
        assert torch.equal(over, apart)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_a_gradient_of_more_than_int32_entries_is_scaled() -> None:
    count = 2**31 + 2049
    needs_memory(6 * GIB)
    values = torch.ones(count, dtype=torch.bfloat16)
    for factor in (1.0, 2.0):
        out = scale_pass(values, torch.tensor(factor), dtype=values.dtype, keep=False, backend="triton")
        assert out is values
        assert values.min() == values.max() == factor


@pytest.mark.parametrize("rows", [65536, 70001])
def test_more_rows_than_a_grid_has_in_y(rows: int) -> None:
    logits, targets = torch.randn(rows, 16), torch.randint(16, (rows,))
    expected = torch.log_softmax(logits, 1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(row_pass(logits, targets, backend="triton").logprobs, expected)


@pytest.mark.filterwarnings("ignore")
def test_fresh_memory_full_of_nan_changes_nothing() -> None:
    problem = Problem(1024, 64, 50257)
    expected = problem.step()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills every torch.empty with NaN
    try:
        assert torch.empty(3).isnan().all()
        got = problem.step()
    finally:
        torch.use_deterministic_algorithms(False)
    for one, two in zip(got, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-6)


def _without_synchronisation(run: Callable[[], object]) -> None:
    run()  # compiles, and queries the free memory
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_step_does_not_wait_for_the_device(backend: str, dtype: torch.dtype) -> None:
    problem = Problem(512, 64, 5003, dtype)
    _without_synchronisation(lambda: problem.step(backend))


def test_log_probabilities_do_not_wait_for_the_device() -> None:
    problem = Problem(512, 64, 5003)
    for rows in (None, 100):
        _without_synchronisation(
            lambda rows=rows: (
                linear_logprob(problem.hidden, problem.weight, problem.targets, chunk_rows=rows, backend="triton")
                .sum()
                .backward()
            )
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [512, 4096])
def test_a_captured_step_replays(n: int, dtype: torch.dtype) -> None:
    """With static shapes, offsets on host and device, and an existing rule. New data replace the old in place."""
    problem = Problem(n, 64, 32000, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            problem.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.step()
    with torch.no_grad():
        problem.hidden.normal_()
        problem.targets.random_(0, 32000)
        problem.rule.table[1, 1] *= 2  # NLL's weight
    graph.replay()
    for one, two in zip(captured, problem.step(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("hidden_size", [2048, 3072])
def test_peak_memory_above_inputs_and_gradients(hidden_size: int) -> None:
    """The budget for logits, or the bf16 gradient in addition to its fp32 sum, which counts as the gradient."""
    n, v = 8192, 128256
    needs_memory(16 * GIB)
    problem = Problem(n, hidden_size, v)
    problem.frozen_hidden = torch.randn(n, hidden_size, dtype=torch.bfloat16)
    problem.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    problem.step()
    torch.cuda.synchronize()
    gradients = n * hidden_size * 2 + v * hidden_size * 4
    above = torch.cuda.max_memory_allocated() - before - gradients
    print(f"D {hidden_size}: {above / GIB:.3f} GiB above inputs and gradients")
    allowed = max(budget(problem.hidden.device), 2 * v * hidden_size)
    assert above <= allowed + 0.2 * GIB


def test_a_compiled_step() -> None:
    problem = Problem(512, 64, 5003)
    expected = problem.step()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        reference = ReferenceRows(problem.frozen_hidden, Head(problem.frozen_weight))
        return linear_sequence_loss(
            hidden, weight, problem.targets, problem.offsets, problem.rule, reference=reference, backend="triton"
        ).loss

    value = torch.compile(loss, fullgraph=True)(problem.hidden, problem.weight)
    got = (value.detach(), *torch.autograd.grad(value, [problem.hidden, problem.weight]))
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-6)
