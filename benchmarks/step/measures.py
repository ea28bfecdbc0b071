"""Measures of a step: the time of its parts on the device's clock, its memory on a CPU, and its FLOP."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.harness.timing import Clock
from efface.batching import PackedBatch
from efface.hf.model.adapted_head import base_of
from efface.hf.model.packing import decoder_of
from efface_kernels import release_workspaces

PARTS = ("forward", "reference", "head", "backward", "update")
"""The policy's decoder, the reference's decoder, heads and losses, backward, clipping and AdamW; in milliseconds."""


class Stopwatch:
    """Records moments during steps and converts them to times when read. On a GPU, recording does not synchronise."""

    def __init__(self, device: torch.device | str) -> None:
        self._gpu = torch.device(device).type == "cuda"
        self._clock = Clock(device)
        self._steps: list[list[tuple[str, Any, Any]]] = []
        self._spans: list[tuple[str, Any, Any]] = []

    def follow(self, *models: Any) -> None:
        """Time the decoders of the models: as "reference" if gradients are disabled, otherwise as "forward"."""
        begun: list[Any] = []

        def begin(*_: object) -> None:
            begun.append(self._clock.now())

        def end(*_: object) -> None:
            part = "forward" if torch.is_grad_enabled() else "reference"
            self._spans.append((part, begun.pop(), self._clock.now()))

        for model in models:
            decoder = decoder_of(base_of(model))
            decoder.register_forward_pre_hook(begin)
            decoder.register_forward_hook(end)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = self._clock.now()
        yield
        self._spans.append((name, begin, self._clock.now()))

    def end_step(self) -> None:
        """Start the next step."""
        self._steps.append(self._spans)
        self._spans = []

    def read(self) -> list[dict[str, float]]:
        """Return the milliseconds of ``PARTS`` in every step since the last call."""
        if self._gpu:
            torch.cuda.synchronize()
        steps, self._steps = self._steps, []
        return [self._parts(spans) for spans in steps]

    def _parts(self, spans: list[tuple[str, Any, Any]]) -> dict[str, float]:
        times = dict.fromkeys(("loss", *PARTS), 0.0)
        for name, begin, end in spans:
            times[name] += self._clock.between(begin, end)
        times["head"] = times.pop("loss") - times["forward"] - times["reference"]
        return times


def peak_mib(call: Callable[[], object]) -> float:
    """Return the most memory, in MiB, that torch's CPU allocator had given out during a call, minus that before it."""
    release_workspaces()  # efface keeps them between calls; the call must allocate its own
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # otherwise the profiler prints two lines
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profiled:
        call()
    assert profiled.kineto_results is not None
    changes = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak / (1 << 20)


# Dense bf16 tensor-core FLOP/s from NVIDIA's data sheets (SXM); each key is part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of the data sheet, or None for an unknown device."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


def layer_parameters(config: LlamaConfig) -> int:
    """Return the number of weights in all matrices of the decoder's layers, without embeddings and head."""
    assert config.head_dim is not None  # transformers fills in a missing value
    assert config.num_key_value_heads is not None
    d, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    attention = 2 * d * config.num_attention_heads * config.head_dim + 2 * d * kv
    return int(config.num_hidden_layers * (attention + 3 * d * config.intermediate_size))


def model_flop(config: LlamaConfig, batch: PackedBatch, *, lora: bool, reference: str) -> float:
    """Return the FLOP that a step needs: 2 per weight and token forward, twice that backward.

    With P weights in the layers, T tokens and N label rows (forget and retain), and a reference model on the T_f
    tokens and N_f label rows of forget: 6 P T + 6 V D N + 2 P T_f + 2 V D N_f. A cached reference costs nothing. LoRA's
    backward pass computes no gradients of frozen weights, so 4 replaces 6. For every provider the following is not
    counted: padding, prompt rows in the head, layers recomputed by gradient checkpointing, attention scores and
    adapters (below 1 % each at these lengths). In a batch with shared beginnings, T counts them once.
    """
    layers, head = layer_parameters(config), config.vocab_size * config.hidden_size
    forget = batch.forget_part()
    own = layers * batch.tokens + head * len(batch.targets)
    compared = layers * forget.tokens + head * len(forget.targets)
    return (4 if lora else 6) * own + (0 if reference == "cached" else 2) * compared
