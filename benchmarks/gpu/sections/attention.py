"""Packed attention: torch's varlen kernel in bf16, forward and backward, against SDPA by segment in fp32.

The kernel does not run on a CPU; there, a plain loop in fp32 is compared with SDPA by segment in fp64.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.section import Run
from benchmarks.harness.shared import tofu_lengths
from benchmarks.harness.timing import interleaved, interleaved_on_gpu, median_ratio, wall_times
from efface.hf.model.attention import interface
from efface.hf.model.attention.choice import AttentionCall, choose_kernel
from efface.hf.model.attention.paths import Paths
from efface.hf.model.attention.segments import band, segment_attention
from efface.hf.model.attention.torch_varlen import torch_varlen_attention

NAMES = ("out", "dq", "dk", "dv")
_ROUNDS = 9


@dataclass(frozen=True)
class AttentionCase:
    """A packed batch with H query heads and H_kv key heads of size d.

    Attributes:
        lengths: tokens of each sequence.
        key_lengths: keys of each sequence; None: ``lengths``.
        window: number of tokens that a token attends to, including itself; None: all tokens before it.
    """

    name: str
    heads: int
    key_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    key_lengths: tuple[int, ...] | None = None
    window: int | None = None

    @property
    def keys(self) -> tuple[int, ...]:
        return self.lengths if self.key_lengths is None else self.key_lengths


Attention = Callable[[Tensor, Tensor, Tensor, AttentionCase], Tensor]
"""(T, H, d), (E, H_kv, d) twice -> (T, H, d)."""


def cases(*, smoke: bool) -> list[AttentionCase]:
    """Return the cases to measure; with ``smoke``, the same cases with few tokens."""
    mixed, longest = (6, 24) if smoke else (64, 2048)
    drawn = tofu_lengths(np.random.default_rng(0), mixed)
    short = tuple(max(2, n // 8) for n in drawn) if smoke else tuple(drawn)
    plain = (1, *short[: mixed // 2], longest, *short[mixed // 2 :], 1, 1)
    # Sequences with shared prefixes: a path has more keys than its segment has tokens.
    paths = tuple(n + extra for n, extra in zip(plain, itertools.cycle((0, *short[:5])), strict=False))
    window = 5 if smoke else 32
    return [
        AttentionCase("heads of 64", 8, 8, 64, plain),
        AttentionCase("heads of 128", 8, 8, 128, plain),
        AttentionCase("grouped heads of 64", 32, 8, 64, plain),
        AttentionCase("grouped heads of 128", 32, 8, 128, plain),
        AttentionCase("TOFU alone, grouped heads of 64", 32, 8, 64, short),
        AttentionCase("a sliding window", 32, 8, 64, plain, window=window),
        AttentionCase("more keys than queries", 32, 8, 64, plain, key_lengths=paths),
        AttentionCase("more keys than queries, a sliding window", 32, 8, 64, plain, key_lengths=paths, window=window),
    ]


def by_varlen(query: Tensor, key: Tensor, value: Tensor, case: AttentionCase) -> Tensor:
    """Run torch's kernel the way ``interface.py`` calls it."""
    return torch_varlen_attention(
        query,
        key,
        value,
        _borders(case.lengths, query.device),
        max(case.lengths),
        cu_keys=_borders(case.keys, query.device),
        longest_keys=max(case.keys),
        window=case.window,
    )


def by_segment(query: Tensor, key: Tensor, value: Tensor, case: AttentionCase) -> Tensor:
    """Run SDPA for one sequence after another."""
    query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))
    return segment_attention(query, key, value, case.lengths, key_lengths=case.keys, window=case.window)[0]


def by_loop(query: Tensor, key: Tensor, value: Tensor, case: AttentionCase) -> Tensor:
    """Compute softmax(q kᵀ / √d) v for one sequence after another."""
    outputs = []
    for q, k, v in zip(query.split(case.lengths), key.split(case.keys), value.split(case.keys), strict=True):
        k, v = (states.repeat_interleave(case.heads // case.key_heads, dim=1) for states in (k, v))  # noqa: PLW2901
        scores = torch.einsum("nhd,mhd->hnm", q, k) * case.head_dim**-0.5
        seen = band(len(q), len(k), case.window, q.device)
        outputs.append(torch.einsum("hnm,mhd->nhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


def by_operator(query: Tensor, key: Tensor, value: Tensor, case: AttentionCase) -> Tensor:
    """Run the operator below ``varlen_attn``, which takes grouped key heads directly; forward only."""
    borders, keys = (_borders(lengths, query.device) for lengths in (case.lengths, case.keys))
    longest = max(case.lengths), max(case.keys)
    left = -1 if case.window is None else case.window - 1
    out: Tensor = torch.ops.aten._flash_attention_forward(  # noqa: SLF001 - what varlen_attn itself calls
        query, key, value, borders, keys, *longest, 0.0, True, False, window_size_left=left, window_size_right=0
    )[0]
    return out


def run(run: Run) -> None:
    """Append one row per case, and one for the time that native grouped heads could save.

    Raises:
        ArithmeticError: errors are larger than those of SDPA in the same dtype allow, results do not repeat bitwise, or
            ``choice.py`` does not choose the kernel.
    """
    every = cases(smoke=run.smoke)
    wrong = [fault for case in every for fault in _measured(case, run)]
    wrong += _gathered(run)
    if not run.smoke:
        _compare_operator(run, next(case for case in every if case.heads > case.key_heads))
    if wrong:
        raise ArithmeticError("packed attention: " + "; ".join(wrong))


def _measured(case: AttentionCase, run: Run) -> list[str]:
    """Call ``_measure``; report an exception as a failed case, so that the other cases still run."""
    try:
        return _measure(case, run)
    except Exception as error:  # noqa: BLE001 - any error
        text = f"{case.name}: {type(error).__name__}: {error}"
        run.row(text.splitlines()[0], case=case.name, problem=text)
        return [text]


def _measure(case: AttentionCase, run: Run) -> list[str]:
    """Append the case's row; return its faults."""
    kernel: Attention = by_loop if run.smoke else by_varlen
    dtype, wider = (torch.float32, torch.float64) if run.smoke else (torch.bfloat16, torch.float32)
    inputs, upstream = _inputs(case, dtype, run.device)
    with sdpa_kernel(SDPBackend.MATH):
        gold = _results(by_segment, [states.to(wider) for states in inputs], upstream.to(wider), case)
    ours, again = (_results(kernel, inputs, upstream, case) for _ in range(2))
    yardstick = _results(by_segment, inputs, upstream, case)
    errors = {name: _distance(got, want) for name, got, want in zip(NAMES, ours, gold, strict=True)}
    allowed = {name: 2 * _distance(got, want) + 1e-3 for name, got, want in zip(NAMES, yardstick, gold, strict=True)}
    repeats = [name for name, first, second in zip(NAMES, ours, again, strict=True) if torch.equal(first, second)]
    chosen = _chosen(case, dtype, run.device)

    calls = {each: lambda _, each=each: _results(each, inputs, upstream, case) for each in (kernel, by_segment)}
    timed = interleaved(calls, 2) if run.smoke else interleaved_on_gpu(calls, _ROUNDS, warm_up=3)
    medians = [sorted(times)[len(times) // 2] for times in timed.values()]
    faster = median_ratio(timed[by_segment], timed[kernel])

    wrong = [
        f"{case.name}: {name} has an error of {errors[name]:.1e} against {wider}, expected at most {allowed[name]:.1e}"
        for name in NAMES
        if not errors[name] <= allowed[name]
    ]
    wrong += [f"{case.name}: {name} differs bitwise in a second run" for name in NAMES if name not in repeats]
    if not run.smoke and chosen == "segments":
        wrong.append(f"{case.name}: expected a packed kernel, got {chosen!r}")
    run.row(
        f"{case.name}: {medians[0]:.2f} ms, {faster:.1f} x SDPA by segment, error "
        + ", ".join(f"{name} {errors[name]:.1e} of {allowed[name]:.1e}" for name in NAMES)
        + f"; kernel: {chosen!r}; bitwise repeatable: {', '.join(repeats) or 'nothing'}",
        case=case.name,
        heads=case.heads,
        key_heads=case.key_heads,
        head_dim=case.head_dim,
        window=case.window,
        tokens=sum(case.lengths),
        keys=sum(case.keys),
        sequences=len(case.lengths),
        longest=max(case.lengths),
        dtype=str(dtype),
        kernel=chosen,
        errors=errors,
        allowed=allowed,
        repeats=repeats,
        ms=medians[0],
        segments_ms=medians[1],
        faster_than_segments=faster,
        wrong=wrong,
    )
    return wrong


def _gathered(run: Run) -> list[str]:
    """Append a row for keys gathered along the paths of a chat template, forward and backward; return its faults.

    64 sequences of TOFU's lengths share 39 tokens. The time is to be compared with that of attention over the paths.
    """
    count, shared = (6, 5) if run.smoke else (64, 39)
    own = [int(n) for n in tofu_lengths(np.random.default_rng(0), count)]
    lengths, parts = tuple(shared + n for n in own), torch.arange(shared + sum(own)).split([shared, *own])
    indices = torch.cat([torch.cat([parts[0], part]) for part in parts[1:]])
    paths = Paths(indices.int().to(run.device), _borders(lengths, run.device), lengths, shared + sum(own))
    dtype = torch.float32 if run.smoke else torch.bfloat16
    case = AttentionCase("a shared prefix, grouped heads of 64", 32, 8, 64, tuple(own), key_lengths=lengths)
    generator = torch.Generator(run.device).manual_seed(0)
    keys, upstream = (
        torch.randn(1, 8, n, 64, generator=generator, device=run.device).to(dtype) for n in (paths.tokens, len(indices))
    )
    inputs, gradient = _inputs(case, dtype, run.device)
    kernel: Attention = by_loop if run.smoke else by_varlen

    def gather(_: int = 0) -> Tensor:
        leaf = keys.detach().requires_grad_()
        return torch.autograd.grad(paths.gather(leaf, dtype), leaf, upstream)[0]

    first, second = gather(), gather()
    gold = torch.zeros(1, 8, paths.tokens, 64, dtype=torch.float64, device=run.device)
    gold.index_add_(2, paths.indices.long(), upstream.double())
    calls: dict[str, Callable[[int], object]] = {
        "gather": gather,
        "attention": lambda _: _results(kernel, inputs, gradient, case),
    }
    timed = interleaved(calls, 2) if run.smoke else interleaved_on_gpu(calls, _ROUNDS, warm_up=3)
    medians = {name: sorted(times)[len(times) // 2] for name, times in timed.items()}
    error, repeats = _distance(first, gold), torch.equal(first, second)
    run.row(
        f"{case.name}: {len(indices)} keys of {paths.tokens} tokens gathered with gradient in {medians['gather']:.3f} "
        f"ms (needed for keys and for values), attention {medians['attention']:.3f} ms; error {error:.1e}, "
        f"{'repeats' if repeats else 'does not repeat'} bitwise",
        case=case.name,
        tokens=paths.tokens,
        keys=len(indices),
        gather_ms=medians["gather"],
        attention_ms=medians["attention"],
        error=error,
        repeats=repeats,
    )
    wrong = [] if error <= (1e-6 if run.smoke else 4e-3) else [f"{case.name}: the gradient has an error of {error:.1e}"]
    return wrong if repeats else [*wrong, f"{case.name}: the gradient differs bitwise in a second run"]


def _compare_operator(run: Run, case: AttentionCase) -> None:
    """Append a row with the speed of torch's operator with grouped key heads; we repeat them for ``varlen_attn``.

    It is no fault if the operator rejects them, because the library does not use it yet.
    """
    (query, key, value), _ = _inputs(case, torch.bfloat16, run.device)
    calls: dict[str, Callable[[int], Tensor]] = {
        "operator": lambda _: by_operator(query, key, value, case),
        "varlen_attn": lambda _: by_varlen(query, key, value, case),
    }
    try:
        with torch.no_grad():
            apart = _distance(calls["operator"](0).float(), calls["varlen_attn"](0).float())
            ms, whole = (
                [sorted(times)[len(times) // 2] for times in timed.values()]
                for timed in (interleaved_on_gpu(calls, _ROUNDS), wall_times(calls, _ROUNDS))
            )
    except Exception as error:  # noqa: BLE001 - any error
        run.row(f"the operator rejects grouped heads: {error}".splitlines()[0], case=case.name, problem=str(error))
        return
    run.row(
        f"the operator with grouped heads, forward: {ms[0]:.3f} ms, wall {whole[0]:.3f} ms; varlen_attn "
        f"{ms[1]:.3f} ms, wall {whole[1]:.3f} ms; difference {apart:.1e}",
        case=case.name,
        operator_ms=ms[0],
        operator_wall_ms=whole[0],
        varlen_ms=ms[1],
        varlen_wall_ms=whole[1],
        apart=apart,
    )


def _inputs(case: AttentionCase, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """Return query, key and value, and the gradient of the output, all drawn from N(0, 1)."""
    generator = torch.Generator(device).manual_seed(0)
    tokens, keys = sum(case.lengths), sum(case.keys)
    shapes = [(tokens, case.heads), (keys, case.key_heads), (keys, case.key_heads), (tokens, case.heads)]
    drawn = [
        torch.randn(rows, heads, case.head_dim, generator=generator, device=device).to(dtype) for rows, heads in shapes
    ]
    return drawn[:3], drawn[3]


def _results(attention: Attention, inputs: list[Tensor], upstream: Tensor, case: AttentionCase) -> list[Tensor]:
    """Return the output and the gradients of query, key and value."""
    query, key, value = leaves = [states.detach().requires_grad_() for states in inputs]
    out = attention(query, key, value, case)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def _chosen(case: AttentionCase, dtype: torch.dtype, device: str) -> str:
    """Return the kernel that a model's attention call with this case would use."""
    call = AttentionCall(
        device=device,
        capability=torch.cuda.get_device_capability() if device == "cuda" else (0, 0),
        dtype=dtype,
        head_dim=case.head_dim,
        value_dim=case.head_dim,
        window=case.window,
    )
    return choose_kernel(call, interface._installed(torch.device(device)))  # noqa: SLF001 - the kernels installed here


def _borders(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device)


def _distance(got: Tensor, want: Tensor) -> float:
    """Return the rms difference relative to the rms of ``want``."""
    return float((got.to(want.dtype) - want).norm() / want.norm())
