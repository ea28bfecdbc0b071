"""RMU's losses on the activations of one layer, recording of those activations, and freezing of parameters."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efface.batching import PackedBatch, Role, StepTotals
from efface.hf.model.adapted_head import base_of
from efface.hf.model.head_loss import HeadLoss, StepOutput
from efface.hf.model.packing import decoder_of
from efface.objectives import RMU
from efface_kernels import segment_sums, to_device


@dataclass(frozen=True)
class ActivationLoss:
    """The share of a micro-batch in RMU's loss; means are taken over the sequences of the whole step.

    Attributes:
        objective: the RMU objective.
        totals: totals of the optimizer step.
        frozen: (n, D) the reference model's activations at the retain answer tokens, or None.
        retain: loss of the head for the retain sequences (NLL or KL), used instead of their activations, or None.
    """

    objective: RMU
    totals: StepTotals
    frozen: Tensor | None = None
    retain: HeadLoss | None = None

    def __call__(self, activations: Tensor, batch: PackedBatch) -> list[StepOutput]:
        """Return an output for the forget part and, if it reads activations, the retain part of the batch.

        Args:
            activations: (T, D) output of the layer.
            batch: the packed batch.
        """
        objective, outputs = self.objective, []
        forget, retain = batch.forget_part(), batch.retain_part()
        rows = answer_rows(activations, batch)
        if forget.lengths:
            target = to_device(objective.steering_vector(rows.shape[1]).to(rows.dtype), rows.device)
            weight = objective.forget_weight(self.totals)
            outputs.append(_squared(rows[: batch.forget_rows], target, forget, Role.FORGET, weight))
        if retain.lengths and self.retain is None:
            # Without frozen activations (alpha 0, an idle rank) the weight is 0; the rows stay in the autograd graph,
            # so that every parameter gets a gradient.
            target = torch.zeros_like(rows[batch.forget_rows :]) if self.frozen is None else self.frozen.to(rows)
            weight = objective.alpha / max(self.totals.retain_sequences, 1) if self.frozen is not None else 0.0
            outputs.append(_squared(rows[batch.forget_rows :], target, retain, Role.RETAIN, weight))
        return outputs


def answer_rows(activations: Tensor, batch: PackedBatch) -> Tensor:
    """Return a layer's activations (N, D) at the answer tokens, for each sequence in turn.

    The answer token of a label row is the next token on the sequence's path, which is the next label row or, for the
    last one, the end of the sequence's segment.

    Raises:
        ValueError: if the batch leaves out last tokens.
    """
    if not batch.last_tokens:
        raise ValueError("`batch`: expected a batch with last tokens, got one without; pack it with last_tokens=True")
    tokens = batch.label_rows.roll(-1)
    tokens[batch.label_offsets.device[1:] - 1] = batch.cu_seqlens[1:].long() - 1
    return activations.index_select(0, tokens)


def _squared(rows: Tensor, target: Tensor, part: PackedBatch, role: Role, weight: float) -> StepOutput:
    """Return ``weight`` times the sum over sequences of (rows − target)², averaged over D and over tokens."""
    values = (rows - target).float().square().mean(1)
    offsets = part.label_offsets.device
    means = segment_sums(values, offsets) / offsets.diff()
    terms = torch.where(part.roles == role, weight * means, 0.0)
    return StepOutput(terms.sum(), terms.detach(), torch.full_like(terms.detach(), torch.nan), None)


class Watched:
    """A recorder of a module's outputs for one batch, which is read in one pass or in one pass per sequence."""

    def __init__(self) -> None:
        self._output: Any = None
        self._passes: list[Any] = []

    def keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        """Keep the module's output; a forward hook on the watched module."""
        self._output = output[0] if isinstance(output, tuple) else output

    def end_pass(self, *_: Any) -> None:
        """Append the last output to the recorded passes; a forward hook on the decoder."""
        self._passes.append(self._output)

    def output(self) -> Tensor:
        """Return the recorded output, (B, T, D); B is 1 for a packed batch.

        Raises:
            RuntimeError: if the module was not called, or its output requires no gradient while gradients are enabled.
        """
        if self._output is None:
            raise RuntimeError(
                "`module_regex`: expected a module that the forward pass calls, got one that was not called; choose "
                "another module"
            )
        output: Tensor = self._passes[0] if len(self._passes) == 1 else torch.cat(self._passes, 1)
        if torch.is_grad_enabled() and not output.requires_grad:
            raise RuntimeError(
                "`module_regex`: expected activations with a gradient, got activations without; train a parameter in "
                "or before that module, and with gradient checkpointing set --gradient-checkpointing-kwargs "
                "'{\"use_reentrant\": false}'"
            )
        return output


@contextmanager
def watched(model: nn.Module, module_regex: str) -> Iterator[Watched]:
    """Record the outputs of the module whose name matches ``module_regex`` while the block runs."""
    watch = Watched()
    handles = [
        find_module(model, module_regex).register_forward_hook(watch.keep),
        decoder_of(base_of(model)).register_forward_hook(watch.end_pass),
    ]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def find_module(model: Any, module_regex: str) -> nn.Module:
    """Return the module whose whole name the regular expression matches; names are those of the base model.

    Raises:
        ValueError: if no module or more than one matches.
    """
    model = base_of(model)
    found = {name: module for name, module in model.named_modules() if re.fullmatch(module_regex, name)}
    if len(found) != 1:
        layers = [name for name in (name for name, _ in model.named_modules()) if re.fullmatch(r".*\.\d+", name)]
        raise ValueError(
            f"`module_regex`: expected {module_regex!r} to match the name of one module of {type(model).__name__}, got "
            f"{', '.join(found) or 'none'}; its layers are {', '.join(layers[:3])} … {layers[-1] if layers else ''}"
        )
    module: nn.Module = next(iter(found.values()))
    return module


@contextmanager
def training_only(model: nn.Module, patterns: tuple[str, ...]) -> Iterator[None]:
    """Apply ``train_only`` while the block runs, and restore every ``requires_grad`` afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        train_only(model, patterns)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def train_only(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Freeze every parameter whose whole name matches none of the regular expressions.

    Raises:
        ValueError: if no trainable parameter is left.
    """
    chosen = 0
    for name, parameter in model.named_parameters():
        wanted = parameter.requires_grad and any(re.fullmatch(pattern, name) for pattern in patterns)
        parameter.requires_grad_(wanted)
        chosen += wanted
    if not chosen:
        raise ValueError(
            f"`trainable_params_regex`: expected an expression that matches a trainable parameter of "
            f"{type(model).__name__}, got {', '.join(map(repr, patterns))}"
        )
