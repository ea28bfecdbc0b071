"""The losses as functions, for people with a training loop of their own.

All take final hidden states and the head's weight instead of logits, and labels in the Hugging Face convention:
unshifted, the label of position t is the token *at* t, predicted from the hidden state at t − 1; −100 is ignored.
Layouts: padded ``hidden (B, T, D)`` with ``labels (B, T)``; or packed ``hidden (T, D)`` with ``labels (T)`` and
``cu_seqlens (S + 1)``.

Only rows that predict a label enter the head. Finding them reads the labels on the host once, which synchronises a
GPU; the trainer's packed batches know their rows and do not.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from efface.batching.plan import Role, StepTotals
from efface.objectives import (
    CEU,
    DPO,
    NPO,
    WGA,
    GradAscent,
    IdkNLL,
    Objective,
    SatImp,
    SimNPO,
    step_terms,
)
from efface.objectives.base import check_positive
from efface_kernels import (
    Head,
    ReferenceRows,
    check_dtype,
    check_shape,
    linear_distribution_loss,
    linear_logprob,
    linear_sequence_loss,
    segment_sums,
)

__all__ = [
    "ceu_loss",
    "dpo_loss",
    "grad_ascent_loss",
    "kl_loss",
    "nll_loss",
    "npo_loss",
    "satimp_loss",
    "sequence_logprobs",
    "simnpo_loss",
    "undial_loss",
    "wga_loss",
]

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
        ValueError: shapes that do not fit, a label out of the vocabulary, a sequence without a label. On a GPU labels
            are not looked at: one out of the vocabulary makes the loss NaN, or ends in a device-side assertion.
    """
    rows = _rows(hidden, weight, labels, bias, softcap, cu_seqlens)
    logprobs = linear_logprob(rows.hidden, weight, rows.targets, bias=bias, softcap=softcap, backend=backend)
    return segment_sums(logprobs, rows.offsets.to(logprobs.device))


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

    Arguments, dtypes and errors are those of ``sequence_logprobs``. Returns a float32 scalar (float64 for float64
    inputs).
    """
    return _loss(IdkNLL(), _rows(hidden, weight, labels, bias, softcap, cu_seqlens), backend)


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

    Arguments, dtypes and errors are those of ``sequence_logprobs``. Returns a float32 scalar (float64 for float64
    inputs).
    """
    return _loss(GradAscent(), _rows(hidden, weight, labels, bias, softcap, cu_seqlens), backend)


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
        reference_logprobs: (B,) or (S,) L_ref from a cache, float32 or float64; or give the two below.
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
    objective = NPO(beta=beta)
    _check_whole(reference_hidden=reference_hidden, reference_weight=reference_weight)
    rows = _rows(hidden, weight, labels, bias, softcap, cu_seqlens)
    reference = None
    if reference_hidden is not None and reference_weight is not None:
        reference = _frozen(rows, reference_hidden, reference_weight, reference_bias)
    elif reference_logprobs is None:
        raise ValueError(
            "a reference: expected `reference_logprobs`, or `reference_hidden` with `reference_weight`, got neither"
        )
    return _loss(objective, rows, backend, reference, reference_logprobs)


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
    return _loss(SimNPO(beta=beta, delta=delta), _rows(hidden, weight, labels, bias, softcap, cu_seqlens), backend)


def dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    alternate_hidden: Tensor,
    alternate_labels: Tensor,
    *,
    beta: float,
    reference_logprobs: Tensor | None = None,
    alternate_reference_logprobs: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    alternate_reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    alternate_cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean over pairs of −(2/β) log σ(β [(L_w − L_w,ref) − (L_l − L_l,ref)]) (DPO, arXiv 2305.18290, equation 7).

    Equal to::

        lost = sequence_logprobs(hidden, weight, labels) - reference_logprobs
        won = sequence_logprobs(alternate_hidden, weight, alternate_labels) - alternate_reference_logprobs
        return -2 / beta * torch.nn.functional.logsigmoid(beta * (won - lost)).mean()

    Args:
        hidden: of the sequences to forget, l, as in ``sequence_logprobs``, like ``weight``, ``labels``, ``bias``,
            ``softcap``, ``cu_seqlens``.
        weight: see ``hidden``.
        labels: see ``hidden``.
        alternate_hidden: of the alternate sequences, w, as many; padded to a length of their own, or packed.
        alternate_labels: see ``alternate_hidden``.
        beta: inverse temperature, > 0.
        reference_logprobs: (B,) L_l,ref from a cache, float32 or float64, with ``alternate_reference_logprobs``; or
            give the three below.
        alternate_reference_logprobs: (B,) L_w,ref.
        reference_hidden: hidden states of the frozen reference model, in the layout of ``hidden``.
        alternate_reference_hidden: the same, in the layout of ``alternate_hidden``.
        reference_weight: (V', D') its head; read in the same pass as the policy's logits.
        reference_bias: (V',) or None.
        bias: see ``hidden``.
        softcap: see ``hidden``; it applies to both heads.
        cu_seqlens: see ``hidden``.
        alternate_cu_seqlens: (S + 1), packed layout only.
        backend: "auto", "native" (C++, CPU tensors), "triton" (GPU tensors) or "torch".

    Returns:
        A float32 scalar (float64 for float64 inputs).

    Raises:
        TypeError: dtypes that differ, or labels that are not int64.
        ValueError: as ``sequence_logprobs``; unequally many sequences; no reference, or both kinds; ``beta`` that is
            not positive.
    """
    objective, forget = DPO(beta=beta), _rows(hidden, weight, labels, bias, softcap, cu_seqlens)
    alternate = _rows(alternate_hidden, weight, alternate_labels, bias, softcap, alternate_cu_seqlens)
    pairs = forget.offsets.shape[0] - 1
    if alternate.offsets.shape[0] - 1 != pairs:
        raise ValueError(
            f"`alternate_labels`: expected {pairs} sequences, one for each of `labels`, got "
            f"{alternate.offsets.shape[0] - 1}"
        )
    _check_whole(
        reference_hidden=reference_hidden,
        alternate_reference_hidden=alternate_reference_hidden,
        reference_weight=reference_weight,
    )
    _check_whole(reference_logprobs=reference_logprobs, alternate_reference_logprobs=alternate_reference_logprobs)
    counts = torch.stack([forget.offsets.diff(), alternate.offsets.diff()], 1)  # (pairs, 2)

    def paired(first: Tensor, second: Tensor) -> Tensor:
        """Interleave: the rows of forget sequence 0, of alternate 0, of forget sequence 1 and so on."""
        split = zip(first.split(counts[:, 0].tolist()), second.split(counts[:, 1].tolist()), strict=True)
        return torch.cat([first[:0], *(rows for pair in split for rows in pair)])

    reference, reference_sums = None, None
    if reference_hidden is not None and alternate_reference_hidden is not None and reference_weight is not None:
        frozen = _frozen(forget, reference_hidden, reference_weight, reference_bias)
        other = _frozen(
            alternate, alternate_reference_hidden, reference_weight, reference_bias, "alternate_reference_hidden"
        )
        reference = ReferenceRows(paired(frozen.hidden, other.hidden), frozen.head)
    if reference_logprobs is not None and alternate_reference_logprobs is not None:
        check_shape("reference_logprobs", reference_logprobs, (pairs,))
        check_shape("alternate_reference_logprobs", alternate_reference_logprobs, (pairs,))
        reference_sums = torch.stack([reference_logprobs, alternate_reference_logprobs], 1).flatten()
    if reference is None and reference_sums is None:
        raise ValueError(
            "a reference: expected `reference_logprobs` with `alternate_reference_logprobs`, or `reference_hidden` and "
            "`alternate_reference_hidden` with `reference_weight`, got neither in full"
        )
    both = replace(
        forget,
        hidden=paired(forget.hidden, alternate.hidden),
        targets=paired(forget.targets, alternate.targets),
        offsets=torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0)]),
    )
    return _loss(objective, both, backend, reference, reference_sums)


def wga_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    beta: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean over label tokens of p^β ℓ, with p = e^ℓ detached (WGA, arXiv 2502.19301).

    ``beta`` ≥ 0; with 0 it is ``grad_ascent_loss``. The other arguments, dtypes and errors are those of
    ``sequence_logprobs``. Returns a float32 scalar (float64 for float64 inputs).
    """
    return _loss(WGA(beta=beta), _rows(hidden, weight, labels, bias, softcap, cu_seqlens), backend)


def satimp_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    beta1: float = 5.0,
    beta2: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean over label tokens of p^β₁ (1 − p)^β₂ ℓ, with p = e^ℓ detached (SatImp, arXiv 2505.11953).

    ``beta1`` ≥ 0 (saturation) spares what is forgotten, ``beta2`` ≥ 0 (importance) what is certain. The other
    arguments, dtypes and errors are those of ``sequence_logprobs``. Returns a float32 scalar (float64 for float64
    inputs).
    """
    return _loss(SatImp(beta1=beta1, beta2=beta2), _rows(hidden, weight, labels, bias, softcap, cu_seqlens), backend)


def ceu_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_first_n_answer_tokens: int = 1,
    bias: Tensor | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean over label tokens of −log(1 − p): CE-U, but for a constant (arXiv 2503.01224).

    Its gradient is that of the cross entropy to the model's own softmax without the true token, detached; its value is
    that cross entropy less the entropy of that target, so that 0 means forgotten.

    The first ``ignore_first_n_answer_tokens`` ≥ 0 labels of each sequence do not count; where none is left, the loss
    is 0. The other arguments, dtypes and errors are those of ``sequence_logprobs``. Returns a float32 scalar (float64
    for float64 inputs).
    """
    objective = CEU(ignore_first_n_answer_tokens=ignore_first_n_answer_tokens)
    return _loss(objective, _rows(hidden, weight, labels, bias, softcap, cu_seqlens), backend)


def kl_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean over label tokens of KL(p_ref‖p): keeps a model close to a frozen one.

    Equal to::

        log_p = torch.log_softmax((hidden @ weight.T)[:, :-1], -1)
        log_q = torch.log_softmax((reference_hidden @ reference_weight.T)[:, :-1], -1)
        return (log_q.exp() * (log_q - log_p)).sum(-1)[labels[:, 1:] != -100].mean()

    but with fp32 logits: of bf16 ones that are nearly equal, the gradient would be rounding noise.

    Args:
        hidden: as in ``sequence_logprobs``, like ``weight``, ``labels``, ``bias``, ``softcap``, ``cu_seqlens``.
        weight: see ``hidden``.
        labels: see ``hidden``; they say which positions count.
        reference_hidden: hidden states of the frozen reference model, in the layout of ``hidden``.
        reference_weight: (V, D') its head, over the same vocabulary.
        reference_bias: (V,) or None.
        bias: see ``hidden``.
        softcap: see ``hidden``; it applies to both heads.
        cu_seqlens: see ``hidden``.
        backend: "auto", "native" (C++, CPU tensors), "triton" (GPU tensors) or "torch".

    Returns:
        A float32 scalar (float64 for float64 inputs).

    Raises:
        TypeError: dtypes that differ, or labels that are not int64.
        ValueError: as ``sequence_logprobs``; a reference of another layout or vocabulary.
    """
    rows = _rows(hidden, weight, labels, bias, softcap, cu_seqlens)
    return _distance(rows, _frozen(rows, reference_hidden, reference_weight, reference_bias), backend)


def undial_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    beta: float,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean over label tokens of the cross entropy to softmax(z_ref − β · onehot) (UNDIAL, arXiv 2402.10052).

    Equal to::

        log_p = torch.log_softmax((hidden @ weight.T)[:, :-1], -1)
        true = torch.nn.functional.one_hot(labels[:, 1:].clamp(min=0), V)
        q = torch.softmax((reference_hidden @ reference_weight.T)[:, :-1] - beta * true, -1)
        return -(q * log_p).sum(-1)[labels[:, 1:] != -100].mean()

    ``beta`` > 0 is what the true token's logit is lowered by; the other arguments, dtypes and errors are those of
    ``kl_loss``. Returns a float32 scalar (float64 for float64 inputs).
    """
    check_positive("beta", beta)
    rows = _rows(hidden, weight, labels, bias, softcap, cu_seqlens)
    frozen = _frozen(rows, reference_hidden, reference_weight, reference_bias)
    return _distance(rows, frozen, backend, shift=beta, cross_entropy=True)


@dataclass(frozen=True)
class _Rows:
    """The label rows of S sequences, at the head."""

    hidden: Tensor  # (N, D)
    head: Head
    targets: Tensor  # (N,)
    offsets: Tensor  # (S + 1,), on the CPU
    positions: Tensor  # (N,) where they stood
    layout: tuple[int, ...]  # (B, T) or (T,)


def _rows(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    cu_seqlens: Tensor | None,
) -> _Rows:
    positions, targets, offsets = label_rows(hidden, labels, cu_seqlens)
    at_labels = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)
    return _Rows(at_labels, Head(weight, bias, softcap), targets, offsets, positions, hidden.shape[:-1])


def _frozen(
    rows: _Rows, hidden: Tensor, weight: Tensor, bias: Tensor | None, name: str = "reference_hidden"
) -> ReferenceRows:
    check_shape(name, hidden, (*rows.layout, "D"), "use the layout of the policy's hidden states")
    at_labels = hidden.detach().reshape(-1, hidden.shape[-1]).index_select(0, rows.positions)
    return ReferenceRows(at_labels, Head(weight.detach(), None if bias is None else bias.detach(), rows.head.softcap))


def _check_whole(**parts: Tensor | None) -> None:
    """Raise ValueError if some parts of a reference are given, and others not."""
    given = [name for name, part in parts.items() if part is not None]
    if given and len(given) < len(parts):
        missing = ", ".join(f"`{name}`" for name in parts if name not in given)
        raise ValueError(f"`{given[0]}`: expected {missing} beside it, got none")


def _loss(
    objective: Objective,
    rows: _Rows,
    backend: str,
    reference: ReferenceRows | None = None,
    reference_sums: Tensor | None = None,
) -> Tensor:
    """The objective's mean over all rows or sequences, with gamma 1; a pair's second sequences are its alternates."""
    counts = rows.offsets.diff().tolist()
    roles = torch.full((len(counts),), Role.FORGET, dtype=torch.int8, device=rows.hidden.device)
    pairs = len(counts) // 2 if objective.forget_data == "both" else 0
    roles[1 : 2 * pairs : 2] = Role.ALTERNATE
    totals = StepTotals(pairs or len(counts), sum(counts), forget_label_counts=tuple(counts))
    return linear_sequence_loss(
        rows.hidden,
        rows.head.weight,
        rows.targets,
        rows.offsets,
        step_terms(replace(objective, gamma=1.0), roles, totals),
        pairs=pairs,
        bias=rows.head.bias,
        softcap=rows.head.softcap,
        reference=reference,
        reference_sums=None if reference_sums is None else reference_sums.detach(),
        backend=backend,
    ).loss


def _distance(
    rows: _Rows, reference: ReferenceRows, backend: str, *, shift: float = 0.0, cross_entropy: bool = False
) -> Tensor:
    """The mean over all rows of KL(q‖p) to a frozen model's distribution, or of the cross entropy to it."""
    return linear_distribution_loss(
        rows.hidden,
        rows.head.weight,
        rows.targets,
        1 / max(rows.hidden.shape[0], 1),
        reference,
        shift=shift,
        cross_entropy=cross_entropy,
        bias=rows.head.bias,
        softcap=rows.head.softcap,
        backend=backend,
    ).loss
