"""What is measured: objectives as open-unlearning writes them, from the targets' log-probabilities."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from efface_kernels import Kind, SequenceRule, Term, segment_sums

BETA = 0.1  # of NPO and DPO
SIMNPO_BETA, SIMNPO_DELTA = 4.5, 0.0
FORGET, OTHER = 0, 1  # roles: the other is DPO's alternate, GradDiff's retain sequence

# The products of 2 N D V floating-point operations that a mode needs: Z, Zr, Z W, Zᵀ h.
FLOOR = {"live": 4, "cached": 3, "frozen, cached": 2, "no reference": 3, "frozen": 2}

# (log-probabilities (N,), row offsets (S + 1), reference sums (S,)) to the loss
FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}


def _named(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def keep(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        FUNCTIONS[name] = function
        return function

    return keep


@_named("NPO")
def npo(logprobs: Tensor, offsets: Tensor, reference: Tensor) -> Tensor:
    """Mean over sequences of −(2/β) log σ(−β (L − L_ref))."""
    return -2 / BETA * F.logsigmoid(-BETA * (segment_sums(logprobs, offsets) - reference)).mean()


@_named("SimNPO")
def simnpo(logprobs: Tensor, offsets: Tensor, _reference: Tensor) -> Tensor:
    """Mean over sequences of −(2/β) log σ(β (−L/n − δ))."""
    mean_nll = -segment_sums(logprobs, offsets) / offsets.diff()
    return -2 / SIMNPO_BETA * F.logsigmoid(SIMNPO_BETA * (mean_nll - SIMNPO_DELTA)).mean()


@_named("DPO")
def dpo(logprobs: Tensor, offsets: Tensor, reference: Tensor) -> Tensor:
    """Mean over pairs (a forget sequence, its alternate) of −(2/β) log σ(β (the alternate's log-ratio − its own))."""
    ratio = segment_sums(logprobs, offsets) - reference
    return -2 / BETA * F.logsigmoid(BETA * (ratio[1::2] - ratio[::2])).mean()


@_named("NLL")
def nll(logprobs: Tensor, _offsets: Tensor, _reference: Tensor) -> Tensor:
    """Mean over rows of −ℓ: a retain loss, or fine-tuning."""
    return -logprobs.mean()


@_named("GradDiff")
def graddiff(logprobs: Tensor, _offsets: Tensor, _reference: Tensor) -> Tensor:
    """Mean of ℓ over the first half of the rows, to forget, and of −ℓ over the second, to retain."""
    half = len(logprobs) // 2
    return logprobs[:half].mean() - logprobs[half:].mean()


KL = "KL retain"  # mean over rows of KL(p_ref‖p): of distributions, not of targets
OBJECTIVES = (*FUNCTIONS, KL)


def roles(objective: str, sequences: int) -> Tensor:
    """Return each sequence's role (S,)."""
    every = torch.zeros(sequences, dtype=torch.int8)
    if objective == "DPO":
        every[1::2] = OTHER
    if objective == "GradDiff":
        every[sequences // 2 :] = OTHER
    return every


def rule(objective: str, rows: int, roles_on_device: Tensor) -> SequenceRule | None:
    """Return the same as efface declares it; KL is no rule."""
    s = len(roles_on_device)
    terms = {
        "NPO": {FORGET: Term(Kind.NPO, 1 / s, beta=BETA)},
        "SimNPO": {FORGET: Term(Kind.SIMNPO, 1 / s, beta=SIMNPO_BETA, delta=SIMNPO_DELTA)},
        "DPO": {FORGET: Term(Kind.DPO, 2 / s, beta=BETA), OTHER: Term(Kind.ALTERNATE)},
        "NLL": {FORGET: Term(Kind.NLL, 1 / rows)},
        "GradDiff": {FORGET: Term(Kind.ASCENT, 2 / rows), OTHER: Term(Kind.NLL, 2 / rows)},
    }
    return SequenceRule.of(roles_on_device, terms[objective]) if objective in terms else None
