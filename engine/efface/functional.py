"""The losses as functions, for people with a training loop of their own.

All take final hidden states and the head's weight instead of logits, and labels in the Hugging Face convention:
unshifted, the label of position t is the token *at* t, predicted from the hidden state at t − 1; −100 is ignored.
Layouts: padded ``hidden (B, T, D)`` with ``labels (B, T)``; or packed ``hidden (T, D)`` with ``labels (T)`` and
``cu_seqlens (S + 1)``.

Only rows that predict a label enter the head. Finding them reads the labels on the host once, which synchronises a
GPU; the trainer's packed batches know their rows and do not.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from efface.objectives.base import check_positive, nll_terms
from efface.objectives.grad_ascent import grad_ascent_terms
from efface.objectives.npo import npo_terms
from efface.objectives.simnpo import simnpo_terms
from efface_kernels import Head, ReferenceRows, Sequences, linear_logprob, linear_sequence_loss
from efface_kernels.checks import check_dtype, check_shape
from efface_kernels.linear_loss.sequences import segment_sums

__all__ = ["grad_ascent_loss", "nll_loss", "npo_loss", "sequence_logprobs", "simnpo_loss"]

IGNORE_INDEX = -100


class LabelRows(NamedTuple):
    """The rows of the flattened hidden states that predict a label."""

    positions: Tensor  # (N,) int64
    targets: Tensor  # (N,) int64
    row_offsets: Tensor  # (S + 1,) int64, on the CPU


def label_rows(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None) -> LabelRows:
    """Shift the labels and return the rows that predict one.

    Args:
        hidden: (B, T, D), or (T, D) with ``cu_seqlens``.
        labels: (B, T) or (T) int64, unshifted, −100 ignored.
        cu_seqlens: (S + 1) integers ascending from 0 to T.

    Raises:
        TypeError: labels that are not int64.
        ValueError: shapes that do not fit, a ``cu_seqlens`` that does not ascend from 0 to T, a sequence without
            a label.
    """
    check_dtype("labels", labels, (torch.int64,))
    if cu_seqlens is None:
        check_shape("hidden", hidden, ("B", "T", "D"), "packed hidden states (T, D) need `cu_seqlens`")
        check_shape("labels", labels, hidden.shape[:2])
        sequences, length = labels.shape
        starts = torch.arange(sequences, device=labels.device) * length
        ends = starts + length
    else:
        check_shape("hidden", hidden, ("T", "D"), "padded hidden states (B, T, D) take no `cu_seqlens`")
        check_shape("labels", labels, hidden.shape[:1])
        bounds = cu_seqlens.to(device=labels.device, dtype=torch.int64)
        host = bounds.tolist()
        if not host or host[0] != 0 or host[-1] != labels.shape[0] or sorted(host) != host:
            raise ValueError(
                f"`cu_seqlens`: expected ascending offsets from 0 to {labels.shape[0]} (the length of `labels`), "
                f"got {host[:8]}{' …' if len(host) > 8 else ''}"
            )
        starts, ends = bounds[:-1], bounds[1:]

    flat = labels.reshape(-1)
    # The first token of a sequence has no hidden state before it, so it is never predicted.
    predicted = flat != IGNORE_INDEX
    predicted[starts[starts < ends]] = False
    positions = predicted.nonzero()[:, 0]  # (N,) positions of the labels
    row_offsets = torch.searchsorted(positions, torch.cat([ends.new_zeros(1), ends])).cpu()
    empty = (row_offsets.diff() == 0).nonzero()[:, 0]
    if empty.numel():
        raise ValueError(
            f"`labels`: expected a label after the first token of every sequence, got none in sequence "
            f"{int(empty[0])}; drop such sequences"
        )
    return LabelRows(positions - 1, flat[positions], row_offsets)


def sequence_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """L_s = Σ ℓ_i: the log-probability of each sequence's labels, differentiable for any upstream gradient.

    Equal to::

        logits = torch.nn.functional.linear(hidden, weight, bias).float()[:, :-1]
        nll = cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
        return -nll.sum(1)

    Args:
        hidden: (B, T, D), or packed (T, D) with ``cu_seqlens``; float16, bfloat16, float32 or float64.
        weight: (V, D), same dtype.
        labels: (B, T) or (T) int64, unshifted, −100 ignored.
        bias: (V,) or None.
        softcap: Gemma-2's cap on the logits, or None.
        cu_seqlens: (S + 1), packed layout only.
        backend: "auto", "native" (C++, CPU tensors), "triton" (GPU tensors) or "torch".

    Returns:
        (B,) or (S,), in nats, float32 (float64 for float64 inputs).

    Raises:
        TypeError: dtypes that differ, or labels that are not int64.
        ValueError: shapes that do not fit, a label out of the vocabulary, a sequence without a label.
    """
    positions, targets, row_offsets = label_rows(hidden, labels, cu_seqlens)
    logprobs = linear_logprob(_rows(hidden, positions), weight, targets, bias=bias, softcap=softcap, backend=backend)
    return segment_sums(logprobs, row_offsets.to(logprobs.device))


def nll_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean over label tokens of −ℓ: the usual language-model loss, ``model(..., labels=labels).loss``.

    Arguments, dtypes and errors are those of ``sequence_logprobs``. Returns a float32 scalar.
    """
    return _mean_over_tokens(nll_terms, hidden, weight, labels, bias, softcap, cu_seqlens, backend)


def grad_ascent_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean over label tokens of +ℓ, the negative of ``nll_loss`` (arXiv 2401.06121, section 4).

    Arguments, dtypes and errors are those of ``sequence_logprobs``. Returns a float32 scalar.
    """
    return _mean_over_tokens(grad_ascent_terms, hidden, weight, labels, bias, softcap, cu_seqlens, backend)


def npo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    beta: float,
    reference_logprobs: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean over sequences of −(2/β) log σ(−β (L − L_ref)) (NPO, arXiv 2404.05868, equation 3).

    Equal to::

        ratio = sequence_logprobs(hidden, weight, labels) - reference_logprobs
        return -2 / beta * torch.nn.functional.logsigmoid(-beta * ratio).mean()

    Args:
        hidden: as in ``sequence_logprobs``, like ``weight``, ``labels``, ``bias``, ``softcap``, ``cu_seqlens``.
        weight: see ``hidden``.
        labels: see ``hidden``.
        beta: inverse temperature, > 0.
        reference_logprobs: (B,) L_ref from a cache, float32 or float64; or give the two below.
        reference_hidden: hidden states of the frozen reference model, in the layout of ``hidden``.
        reference_weight: (V', D') its head; read in the same pass as the policy's logits.
        reference_bias: (V',) or None.
        bias: see ``hidden``.
        softcap: see ``hidden``; it applies to both heads.
        cu_seqlens: see ``hidden``.
        backend: "auto", "native" (C++, CPU tensors), "triton" (GPU tensors) or "torch".

    Returns:
        A float32 scalar (float64 for float64 inputs).

    Raises:
        TypeError: dtypes that differ, or labels that are not int64.
        ValueError: as ``sequence_logprobs``; no reference, or both kinds; ``beta`` that is not positive.
    """
    check_positive("beta", beta)
    positions, targets, row_offsets = label_rows(hidden, labels, cu_seqlens)
    reference = None
    if reference_hidden is not None and reference_weight is not None:
        check_shape("reference_hidden", reference_hidden, (*hidden.shape[:-1], "D"), "use the layout of `hidden`")
        reference = ReferenceRows(
            _rows(reference_hidden.detach(), positions),
            Head(reference_weight.detach(), None if reference_bias is None else reference_bias.detach(), softcap),
        )
    elif reference_logprobs is None:
        raise ValueError(
            "a reference: expected `reference_logprobs`, or `reference_hidden` with `reference_weight`, got neither"
        )
    sequences = row_offsets.shape[0] - 1
    return linear_sequence_loss(
        _rows(hidden, positions),
        weight,
        targets,
        row_offsets,
        lambda s: npo_terms(s, beta=beta) / sequences,
        bias=bias,
        softcap=softcap,
        reference=reference,
        reference_sums=None if reference_logprobs is None else reference_logprobs.detach(),
        backend=backend,
    ).loss


def simnpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    beta: float,
    delta: float = 0.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean over sequences of −(2/β) log σ(β (−L/n − δ)) (SimNPO, arXiv 2410.07163, equation 4).

    Equal to::

        reward = -sequence_logprobs(hidden, weight, labels) / (labels[:, 1:] != -100).sum(1)
        return -2 / beta * torch.nn.functional.logsigmoid(beta * (reward - delta)).mean()

    ``beta`` > 0 is the inverse temperature, ``delta`` the reward margin; the other arguments, dtypes and errors are
    those of ``sequence_logprobs``. Returns a float32 scalar (float64 for float64 inputs).
    """
    check_positive("beta", beta)
    positions, targets, row_offsets = label_rows(hidden, labels, cu_seqlens)
    sequences = row_offsets.shape[0] - 1
    return linear_sequence_loss(
        _rows(hidden, positions),
        weight,
        targets,
        row_offsets,
        lambda s: simnpo_terms(s, beta=beta, delta=delta) / sequences,
        bias=bias,
        softcap=softcap,
        backend=backend,
    ).loss


def _rows(hidden: Tensor, positions: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)  # (N, D)


def _mean_over_tokens(
    terms: Callable[[Sequences], Tensor],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> Tensor:
    positions, targets, row_offsets = label_rows(hidden, labels, cu_seqlens)
    tokens = max(positions.shape[0], 1)
    return linear_sequence_loss(
        _rows(hidden, positions),
        weight,
        targets,
        row_offsets,
        lambda s: terms(s) / tokens,
        bias=bias,
        softcap=softcap,
        backend=backend,
    ).loss
