"""What is measured of a step: its parts, by the device's own clock, and the FLOP that it must compute."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.harness.timing import Clock
from benchmarks.step.inputs import Step
from efface.hf.model.adapted_head import base_of
from efface.hf.model.packing import decoder_of

PARTS = ("forward", "reference", "head", "backward", "update")
"""The policy's decoder; the frozen model's; heads and losses; backward; clipping and AdamW. In milliseconds."""


class Stopwatch:
    """Keeps moments while steps run, and makes times of them when read: on a GPU it never waits for a step."""

    def __init__(self, device: torch.device | str) -> None:
        self._gpu = torch.device(device).type == "cuda"
        self._clock = Clock(device)
        self._steps: list[list[tuple[str, Any, Any]]] = []
        self._spans: list[tuple[str, Any, Any]] = []

    def follow(self, *models: Any) -> None:
        """Time the decoders of the models: "reference" where no gradients are kept, else "forward"."""
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
        """Time what is within."""
        begin = self._clock.now()
        yield
        self._spans.append((name, begin, self._clock.now()))

    def end_step(self) -> None:
        """What follows belongs to the next step."""
        self._steps.append(self._spans)
        self._spans = []

    def read(self) -> list[dict[str, float]]:
        """Return the milliseconds of ``PARTS`` in every step since the last reading."""
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


# Dense bf16 tensor-core FLOP/s from NVIDIA's data sheets (SXM), by what the device's name contains.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s that the maker states, None for a device that is not listed."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


def layer_parameters(config: LlamaConfig) -> int:
    """Weights of all matrices of the decoder's layers; embeddings and the head are not among them."""
    assert config.head_dim is not None  # transformers fills in what is not given
    assert config.num_key_value_heads is not None
    d, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    attention = 2 * d * config.num_attention_heads * config.head_dim + 2 * d * kv
    return int(config.num_hidden_layers * (attention + 3 * d * config.intermediate_size))


def model_flop(config: LlamaConfig, step: Step, *, lora: bool, reference: str) -> float:
    """FLOP that the step needs: 2 a weight and token forward, twice that backward.

    With P weights in the layers, T real tokens and N label rows, all of them of forget and retain, and a reference
    model on the T_f and N_f of forget: 6 P T + 6 V D N + 2 P T_f + 2 V D N_f. A cached reference is free; LoRA's
    backward pass has no gradients of frozen weights, 4 instead of 6. Not counted, as for everybody: padding, prompt
    rows in the head, layers run again by gradient checkpointing, attention scores and adapters (below 1 % each at
    these lengths).
    """
    layers, head = layer_parameters(config), config.vocab_size * config.hidden_size
    batch = step.batch
    forget = batch.forget_part()
    own = layers * batch.tokens + head * len(batch.targets)
    compared = layers * forget.tokens + head * len(forget.targets)
    return (4 if lora else 6) * own + (0 if reference == "cached" else 2) * compared
