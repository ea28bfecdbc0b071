"""The attention of one layer over the batches of a step: how much of its time gathers keys and values along paths.

In a batch with shared beginnings, the keys of a sequence are in several segments. They are gathered before the kernel
runs, and the backward pass adds the gradients of a token over the sequences that contain it.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.timing import Clock
from benchmarks.step.inputs import StepShape, assembled
from efface.batching import PackedBatch
from efface.hf.model.attention.interface import PackedLengths, varlen_attention
from efface.hf.model.attention.paths import Paths
from efface.hf.model.attention.segments import working_dtype

WHOLE, SHARED, GATHER = "every sequence whole", "shared beginnings", "of it, gathering keys and values"
_WARM_UP = 2
_MODULE = torch.nn.Identity()  # the layer, which the function only names in errors


@dataclass
class AttentionRow:
    """The attention of one layer in one step: medians in milliseconds, and shares of the attention with paths."""

    shape: str
    part: str
    tokens: int  # queries
    keys: int  # as the kernel reads them: along all paths
    forward_ms: float
    backward_ms: float
    forward_share: float | None = None  # of gathering, in the attention with shared beginnings
    backward_share: float | None = None


def measure(name: str, shape: StepShape, device: str, rounds: int) -> list[AttentionRow]:
    """Time the attention of one layer over each step in turn, interleaved, on random queries, keys and values."""
    data = shape.stores()
    whole, once = (assembled(data, pairs=shape.pairs, share=share) for share in (False, True))
    steps = [(whole[i].batches[0].to(device), once[i].batches[0].to(device)) for i in range(shape.steps)]
    calls = [_calls(shape, *step, device) for step in steps]
    clock = Clock(device)
    spans: dict[str, list[list[object]]] = {part: [] for part in (WHOLE, SHARED, GATHER)}
    for round_ in range(-_WARM_UP, rounds):
        for part, call in calls[round_ % len(calls)].items():
            moments = [clock.now()]
            out = call()
            moments.append(clock.now())
            ones = [torch.ones_like(each) for each in out]
            moments.append(clock.now())
            torch.autograd.backward(out, ones)
            moments.append(clock.now())
            if round_ >= 0:
                spans[part].append(moments)
    if device == "cuda":
        torch.cuda.synchronize()
    times = {part: [(clock.between(a, b), clock.between(c, d)) for a, b, c, d in own] for part, own in spans.items()}
    rows = [_row(name, part, times[part], [step[part != WHOLE] for step in steps]) for part in times]
    forward, backward = (
        statistics.median(gather[way] / all_[way] for gather, all_ in zip(times[GATHER], times[SHARED], strict=True))
        for way in (0, 1)
    )
    rows[-1] = replace(rows[-1], forward_share=forward, backward_share=backward)
    return rows


def _row(name: str, part: str, times: Sequence[tuple[float, float]], batches: Sequence[PackedBatch]) -> AttentionRow:
    forward, backward = (statistics.median(each) for each in zip(*times, strict=True))
    tokens, keys = (round(statistics.mean(each)) for each in zip(*map(_sizes, batches), strict=True))
    return AttentionRow(name, part, tokens, keys, forward, backward)


def _sizes(batch: PackedBatch) -> tuple[int, int]:
    return batch.tokens, sum(batch.path_lengths)


def _calls(
    shape: StepShape, whole: PackedBatch, shared: PackedBatch, device: str
) -> Mapping[str, Callable[[], tuple[Tensor, ...]]]:
    """Return functions that compute each part; each call makes a new graph."""
    config = shape.llama()
    width = config.hidden_size // config.num_attention_heads

    def states(heads: int | None, tokens: int) -> Tensor:
        assert heads is not None  # transformers fills in a missing value
        made = torch.randn(1, tokens, heads, width, device=device, dtype=shape.dtype)  # as a projection's output
        return made.requires_grad_().transpose(1, 2)

    def attention(batch: PackedBatch) -> Callable[[], tuple[Tensor, ...]]:
        q = states(config.num_attention_heads, batch.tokens)
        k, v = (states(config.num_key_value_heads, batch.tokens) for _ in range(2))
        lengths = PackedLengths(batch.segment_lengths, Paths.of(batch) if batch.shared else None)
        return lambda: (
            varlen_attention(_MODULE, q, k, v, None, packed_lengths=lengths, cu_seq_lens_q=batch.cu_seqlens)[0],
        )

    k, v = (states(config.num_key_value_heads, shared.tokens) for _ in range(2))
    gather = partial(Paths.of(shared).gather, dtype=working_dtype(k))
    return {
        WHOLE: attention(whole),
        SHARED: attention(shared),
        GATHER: lambda: (gather(k), gather(v)),
    }
