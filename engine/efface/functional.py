"""Unlearning losses as functions, for use in your own training loop.

Every function takes the final hidden states and the weight of the ``lm_head`` instead of logits. Labels follow the
Hugging Face convention: they are not shifted, so the label at position t is the token *at* t, which the model predicts
from the hidden state at t − 1. Positions with label −100 are ignored.

Two layouts are accepted: padded, ``hidden (B, T, D)`` with ``labels (B, T)``; and packed, ``hidden (T, D)`` with
``labels (T)`` and ``cu_seqlens (S + 1)``, the offsets of the S sequences.

The head is applied only to the hidden states that predict a label. Selecting these rows reads the labels on the host,
which synchronises a GPU once per call. ``UnlearnTrainer`` avoids this synchronisation: its packed batches already
contain the row indices.
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
    """Rows of the flattened hidden states that predict a label, grouped by sequence."""

    positions: Tensor  # (N,) int64
    targets: Tensor  # (N,) int64
    row_offsets: Tensor  # (S + 1,) int64, on the CPU


def label_rows(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None) -> LabelRows:
    """Shift the labels and return the rows of ``hidden`` that predict one.

    Args:
        hidden: (B, T, D), or (T, D) with ``cu_seqlens``.
        labels: (B, T) or (T) int64, not shifted; −100 is ignored.
        cu_seqlens: (S + 1) integers in ascending order from 0 to T.

    Raises:
        TypeError: if ``labels`` are not int64.
        ValueError: if the shapes do not match, ``cu_seqlens`` does not ascend from 0 to T, or a sequence has no label
            after its first token.
    """
    check_dtype("labels", labels, (torch.int64,))
    if cu_seqlens is None:
        check_shape("hidden", hidden, ("B", "T", "D"), "pass `cu_seqlens` with packed hidden states (T, D)")
        check_shape("labels", labels, hidden.shape[:2])
        sequences, length = labels.shape
        starts = torch.arange(sequences, device=labels.device) * length
        ends = starts + length
    else:
        check_shape("hidden", hidden, ("T", "D"), "omit `cu_seqlens` for padded hidden states (B, T, D)")
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
    # No hidden state precedes the first token of a sequence, so this token is never predicted.
    predicted = flat != IGNORE_INDEX
    predicted[starts[starts < ends]] = False
    positions = predicted.nonzero()[:, 0]  # (N,) positions of the labels
    row_offsets = torch.searchsorted(positions, torch.cat([ends.new_zeros(1), ends])).cpu()
    empty = (row_offsets.diff() == 0).nonzero()[:, 0]
    if empty.numel():
        raise ValueError(
            f"`labels`: expected at least one label after the first token of every sequence, got none in sequence "
            f"{int(empty[0])}; drop sequences without a label"
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
    """Return the log-probability L_s = Σ ℓ_i of each sequence's labels, differentiable for any upstream gradient.

    Equal to::

        logits = torch.nn.functional.linear(hidden, weight, bias).float()[:, :-1]
        nll = cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
        return -nll.sum(1)

    Args:
        hidden: (B, T, D), or packed (T, D) with ``cu_seqlens``; float16, bfloat16, float32 or float64.
        weight: (V, D), same dtype.
        labels: (B, T) or (T) int64, not shifted; −100 is ignored.
        bias: (V,) or None.
        softcap: Gemma-2's cap on the logits, z ← softcap · tanh(z / softcap), or None.
        cu_seqlens: (S + 1) offsets of the sequences, for the packed layout only.
        backend: "auto", "native" (C++, CPU tensors), "triton" (GPU tensors) or "torch".

    Returns:
        (B,) or (S,), in nats, float32 (float64 for float64 inputs).

    Raises:
        TypeError: if dtypes differ, or ``labels`` are not int64.
        ValueError: if shapes do not match, a label is outside the vocabulary, or a sequence has no label. The range of
            labels is not checked on a GPU: a label outside the vocabulary makes the loss NaN or triggers a device-side
            assertion.

    Example:
        >>> import torch
        >>> from efface.functional import sequence_logprobs
        >>> hidden, weight = torch.zeros(2, 4, 8), torch.zeros(16, 8)  # uniform over 16 tokens
        >>> labels = torch.tensor([[-100, 3, 1, 4], [-100, -100, 5, 9]])
        >>> sequence_logprobs(hidden, weight, labels)  # 3 and 2 labels of -log 16 each
        tensor([-8.3178, -5.5452])
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
    """Return the mean over label tokens of −ℓ, the language-model loss ``model(..., labels=labels).loss``.

    Arguments, dtypes and errors are those of ``sequence_logprobs``. The result is a float32 scalar (float64 for float64
    inputs).

    Example:
        >>> import torch
        >>> from efface.functional import nll_loss
        >>> hidden, weight = torch.zeros(1, 4, 8), torch.zeros(16, 8)  # uniform over 16 tokens
        >>> nll_loss(hidden, weight, torch.tensor([[-100, 3, 1, 4]]))  # log 16
        tensor(2.7726)
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
    """Return the mean over label tokens of +ℓ, the negative of ``nll_loss`` (arXiv 2401.06121, section 4).

    Arguments, dtypes and errors are those of ``sequence_logprobs``. The result is a float32 scalar (float64 for float64
    inputs).

    Example:
        >>> import torch
        >>> from efface.functional import grad_ascent_loss
        >>> hidden, weight = torch.zeros(1, 4, 8), torch.zeros(16, 8)  # uniform over 16 tokens
        >>> grad_ascent_loss(hidden, weight, torch.tensor([[-100, 3, 1, 4]]))  # -log 16
        tensor(-2.7726)
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
    """Return the mean over sequences of −(2/β) log σ(−β (L − L_ref)) (NPO, arXiv 2404.05868, equation 3).

    Equal to::

        ratio = sequence_logprobs(hidden, weight, labels) - reference_logprobs
        return -2 / beta * torch.nn.functional.logsigmoid(-beta * ratio).mean()

    Args:
        hidden: see ``sequence_logprobs``.
        weight: see ``sequence_logprobs``.
        labels: see ``sequence_logprobs``.
        beta: inverse temperature, > 0.
        reference_logprobs: (B,) or (S,) cached L_ref, float32 or float64. Pass either this, or ``reference_hidden``
            with ``reference_weight``.
        reference_hidden: hidden states of the frozen reference model, in the layout of ``hidden``.
        reference_weight: (V', D') head of the reference model; its logits are read in the same pass as the policy's.
        reference_bias: (V',) or None.
        bias: see ``sequence_logprobs``.
        softcap: see ``sequence_logprobs``; it applies to both heads.
        cu_seqlens: see ``sequence_logprobs``.
        backend: "auto", "native" (C++, CPU tensors), "triton" (GPU tensors) or "torch".

    Returns:
        A float32 scalar (float64 for float64 inputs).

    Raises:
        TypeError: if dtypes differ, or ``labels`` are not int64.
        ValueError: as ``sequence_logprobs``; if both kinds of reference are given, or neither; if ``beta`` is not
            positive.

    Example:
        >>> import torch
        >>> from efface.functional import npo_loss
        >>> hidden, weight = torch.zeros(1, 4, 8), torch.zeros(16, 8)
        >>> frozen = {"reference_hidden": hidden, "reference_weight": weight}  # equal models: 2/β log 2
        >>> npo_loss(hidden, weight, torch.tensor([[-100, 3, 1, 4]]), beta=0.1, **frozen)
        tensor(13.8629)
    """
    objective = NPO(beta=beta)
    _check_whole(reference_hidden=reference_hidden, reference_weight=reference_weight)
    rows = _rows(hidden, weight, labels, bias, softcap, cu_seqlens)
    reference = None
    if reference_hidden is not None and reference_weight is not None:
        reference = _frozen(rows, reference_hidden, reference_weight, reference_bias)
    elif reference_logprobs is None:
        raise ValueError(
            "`reference_logprobs`: expected a reference for NPO, got none; pass `reference_logprobs`, or "
            "`reference_hidden` with `reference_weight`"
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
    """Return the mean over sequences of −(2/β) log σ(β (−L/n − δ)) (SimNPO, arXiv 2410.07163, equation 4).

    Equal to::

        reward = -sequence_logprobs(hidden, weight, labels) / (labels[:, 1:] != -100).sum(1)
        return -2 / beta * torch.nn.functional.logsigmoid(beta * (reward - delta)).mean()

    ``beta`` > 0 is the inverse temperature and ``delta`` the reward margin. The other arguments, dtypes and errors are
    those of ``sequence_logprobs``. The result is a float32 scalar (float64 for float64 inputs).

    Example:
        >>> import torch
        >>> from efface.functional import simnpo_loss
        >>> hidden, weight = torch.zeros(1, 4, 8), torch.zeros(16, 8)  # uniform over 16 tokens
        >>> simnpo_loss(hidden, weight, torch.tensor([[-100, 3, 1, 4]]), beta=1.0)  # 2 log(1 + 1/16)
        tensor(0.1212)
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
    """Return the mean over pairs of −(2/β) log σ(β [(L_w − L_w,ref) − (L_l − L_l,ref)]).

    This is the DPO loss (arXiv 2305.18290, equation 7) times 2/β, as in NPO. Here l is the sequence to forget and w its
    alternate, the preferred answer.

    Equal to::

        lost = sequence_logprobs(hidden, weight, labels) - reference_logprobs
        won = sequence_logprobs(alternate_hidden, weight, alternate_labels) - alternate_reference_logprobs
        return -2 / beta * torch.nn.functional.logsigmoid(beta * (won - lost)).mean()

    Args:
        hidden: hidden states of the sequences to forget, l; see ``sequence_logprobs``.
        weight: see ``sequence_logprobs``.
        labels: see ``sequence_logprobs``.
        alternate_hidden: hidden states of the alternate sequences, w, one for each sequence to forget. Packed, or
            padded to a length that may differ from that of ``hidden``.
        alternate_labels: labels in the layout of ``alternate_hidden``.
        beta: inverse temperature, > 0.
        reference_logprobs: (B,) or (S,) cached L_l,ref, float32 or float64; needs ``alternate_reference_logprobs``.
            Pass either these two, or ``reference_hidden``, ``alternate_reference_hidden`` and ``reference_weight``.
        alternate_reference_logprobs: (B,) or (S,) cached L_w,ref.
        reference_hidden: hidden states of the frozen reference model, in the layout of ``hidden``.
        alternate_reference_hidden: the same for the alternate sequences, in the layout of ``alternate_hidden``.
        reference_weight: (V', D') head of the reference model; its logits are read in the same pass as the policy's.
        reference_bias: (V',) or None.
        bias: see ``sequence_logprobs``.
        softcap: see ``sequence_logprobs``; it applies to both heads.
        cu_seqlens: see ``sequence_logprobs``.
        alternate_cu_seqlens: (S + 1) offsets of the alternate sequences, for the packed layout only.
        backend: "auto", "native" (C++, CPU tensors), "triton" (GPU tensors) or "torch".

    Returns:
        A float32 scalar (float64 for float64 inputs).

    Raises:
        TypeError: if dtypes differ, or labels are not int64.
        ValueError: as ``sequence_logprobs``; if the numbers of sequences differ; if both kinds of reference are given,
            or neither in full; if ``beta`` is not positive.

    Example:
        >>> import torch
        >>> from efface.functional import dpo_loss
        >>> hidden, weight, zero = torch.zeros(1, 4, 8), torch.zeros(16, 8), torch.zeros(1)
        >>> labels, alternate = torch.tensor([[-100, 3, 1, 4]]), torch.tensor([[-100, 5, 9, 2]])
        >>> cached = {"reference_logprobs": zero, "alternate_reference_logprobs": zero}
        >>> dpo_loss(hidden, weight, labels, hidden, alternate, beta=0.1, **cached)  # 2/β log 2
        tensor(13.8629)
    """
    objective, forget = DPO(beta=beta), _rows(hidden, weight, labels, bias, softcap, cu_seqlens)
    alternate = _rows(alternate_hidden, weight, alternate_labels, bias, softcap, alternate_cu_seqlens)
    pairs = forget.offsets.shape[0] - 1
    if alternate.offsets.shape[0] - 1 != pairs:
        raise ValueError(
            f"`alternate_labels`: expected {pairs} sequences, one for each sequence of `labels`, got "
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
        """Interleave the rows by sequence: forget sequence 0, alternate 0, forget sequence 1, and so on."""
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
            "`reference_logprobs`: expected a reference for DPO, got none; pass `reference_logprobs` with "
            "`alternate_reference_logprobs`, or `reference_hidden` and `alternate_reference_hidden` with "
            "`reference_weight`"
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
    """Return the mean over label tokens of p^β ℓ, with p = e^ℓ detached (WGA, arXiv 2502.19301).

    ``beta`` ≥ 0; with ``beta=0`` the loss equals ``grad_ascent_loss``. The other arguments, dtypes and errors are those
    of ``sequence_logprobs``. The result is a float32 scalar (float64 for float64 inputs).

    Example:
        >>> import torch
        >>> from efface.functional import wga_loss
        >>> hidden, weight = torch.zeros(1, 4, 8), torch.zeros(16, 8)  # uniform over 16 tokens
        >>> wga_loss(hidden, weight, torch.tensor([[-100, 3, 1, 4]]))  # -log(16) / 16
        tensor(-0.1733)
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
    """Return the mean over label tokens of p^β₁ (1 − p)^β₂ ℓ, with p = e^ℓ detached (SatImp, arXiv 2505.11953).

    ``beta1`` ≥ 0 (saturation) lowers the weight of tokens that are already forgotten, p near 0. ``beta2`` ≥ 0
    (importance) lowers the weight of tokens that the model is certain of, p near 1. The other arguments, dtypes and
    errors are those of ``sequence_logprobs``. The result is a float32 scalar (float64 for float64 inputs).

    Example:
        >>> import torch
        >>> from efface.functional import satimp_loss
        >>> hidden, weight = torch.zeros(1, 4, 8), torch.zeros(2, 8)  # uniform over 2 tokens
        >>> labels = torch.tensor([[-100, 1, 0, 1]])
        >>> satimp_loss(hidden, weight, labels, beta1=1.0, beta2=1.0)  # -log(2) / 4
        tensor(-0.1733)
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
    """Return the mean over label tokens of −log(1 − p), which is CE-U up to a constant (arXiv 2503.01224).

    CE-U is the cross entropy to a detached target: the model's own softmax with the true token removed. This function
    has the same gradient. Its value is lower by the entropy of the target, so 0 means that the token is forgotten.

    The first ``ignore_first_n_answer_tokens`` ≥ 0 labels of each sequence are left out of the mean. If no label
    remains, the loss is 0. The other arguments, dtypes and errors are those of ``sequence_logprobs``. The result is a
    float32 scalar (float64 for float64 inputs).

    Example:
        >>> import torch
        >>> from efface.functional import ceu_loss
        >>> hidden, weight = torch.zeros(1, 4, 8), torch.zeros(16, 8)  # uniform over 16 tokens
        >>> ceu_loss(hidden, weight, torch.tensor([[-100, 3, 1, 4]]))  # -log(15/16)
        tensor(0.0645)
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
    """Return the mean over label tokens of KL(p_ref‖p), which keeps the model close to a frozen reference model.

    Equal to::

        log_p = torch.log_softmax((hidden @ weight.T)[:, :-1], -1)
        log_q = torch.log_softmax((reference_hidden @ reference_weight.T)[:, :-1], -1)
        return (log_q.exp() * (log_q - log_p)).sum(-1)[labels[:, 1:] != -100].mean()

    but with fp32 logits: where two models are nearly equal, the gradient from bf16 logits would be rounding noise.

    Args:
        hidden: see ``sequence_logprobs``.
        weight: see ``sequence_logprobs``.
        labels: see ``sequence_logprobs``; they select the positions that enter the mean.
        reference_hidden: hidden states of the frozen reference model, in the layout of ``hidden``.
        reference_weight: (V, D') head of the reference model, over the same vocabulary.
        reference_bias: (V,) or None.
        bias: see ``sequence_logprobs``.
        softcap: see ``sequence_logprobs``; it applies to both heads.
        cu_seqlens: see ``sequence_logprobs``.
        backend: "auto", "native" (C++, CPU tensors), "triton" (GPU tensors) or "torch".

    Returns:
        A float32 scalar (float64 for float64 inputs).

    Raises:
        TypeError: if dtypes differ, or ``labels`` are not int64.
        ValueError: as ``sequence_logprobs``; if the layout or the vocabulary of the reference differs.

    Example:
        >>> import torch
        >>> from efface.functional import kl_loss
        >>> hidden, weight = torch.zeros(1, 4, 8), torch.zeros(16, 8)
        >>> frozen = {"reference_hidden": hidden, "reference_weight": weight}  # equal models
        >>> kl_loss(hidden, weight, torch.tensor([[-100, 3, 1, 4]]), **frozen)
        tensor(0.)
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
    """Return the mean over label tokens of the cross entropy to softmax(z_ref − β · onehot).

    This is UNDIAL (arXiv 2402.10052): the target is the reference model's distribution with the logit of the true token
    lowered by β.

    Equal to::

        log_p = torch.log_softmax((hidden @ weight.T)[:, :-1], -1)
        true = torch.nn.functional.one_hot(labels[:, 1:].clamp(min=0), V)
        q = torch.softmax((reference_hidden @ reference_weight.T)[:, :-1] - beta * true, -1)
        return -(q * log_p).sum(-1)[labels[:, 1:] != -100].mean()

    ``beta`` must be > 0. The other arguments, dtypes and errors are those of ``kl_loss``. The result is a float32
    scalar (float64 for float64 inputs).

    Example:
        >>> import torch
        >>> from efface.functional import undial_loss
        >>> hidden, weight = torch.zeros(1, 4, 8), torch.zeros(16, 8)  # uniform over 16 tokens
        >>> frozen = {"reference_hidden": hidden, "reference_weight": weight}
        >>> undial_loss(hidden, weight, torch.tensor([[-100, 3, 1, 4]]), beta=3.0, **frozen)  # log 16
        tensor(2.7726)
    """
    check_positive("beta", beta)
    rows = _rows(hidden, weight, labels, bias, softcap, cu_seqlens)
    frozen = _frozen(rows, reference_hidden, reference_weight, reference_bias)
    return _distance(rows, frozen, backend, shift=beta, cross_entropy=True)


@dataclass(frozen=True)
class _Rows:
    """The label rows of S sequences and the head that they go through."""

    hidden: Tensor  # (N, D)
    head: Head
    targets: Tensor  # (N,)
    offsets: Tensor  # (S + 1,), on the CPU
    positions: Tensor  # (N,) indices of the rows in the flattened hidden states
    layout: tuple[int, ...]  # shape of the hidden states without D: (B, T) or (T,)


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
    """Raise ValueError if only some of the arguments that make up a reference are given."""
    given = [name for name, part in parts.items() if part is not None]
    if given and len(given) < len(parts):
        missing = ", ".join(f"`{name}`" for name in parts if name not in given)
        raise ValueError(f"`{given[0]}`: expected {missing} as well, got None; pass all of them or omit them all")


def _loss(
    objective: Objective,
    rows: _Rows,
    backend: str,
    reference: ReferenceRows | None = None,
    reference_sums: Tensor | None = None,
) -> Tensor:
    """Return the objective's mean over all rows or sequences with gamma = 1.

    In pairs (``forget_data == "both"``), every second sequence is the alternate of the one before it.
    """
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
    """Return the mean over all rows of KL(q‖p), or of the cross entropy to q, the reference's distribution."""
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
