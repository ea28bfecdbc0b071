"""Objectives whose forget loss is a function of log-probabilities.

Formulas and gradients stand in ``efface_kernels.sequence_loss.reference``, for GPUs in ``kernel`` beside it. L is the
log-probability of a sequence's labels, n their number; ℓ and p = e^ℓ are those of each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from efface.batching.plan import StepTotals
from efface.objectives.base import (
    Objective,
    check_finite,
    check_not_negative,
    check_positive,
    get_objective,
    register_objective,
)
from efface_kernels import Kind, Sequences, Term


@register_objective
@dataclass(frozen=True, kw_only=True)
class GradAscent(Objective):
    """gamma · mean over label tokens of ℓ; no retain term by default (arXiv 2401.06121, section 4).

    It has no lower bound, so long runs destroy the model.
    """

    alpha: float = 0.0

    name: ClassVar[str] = "grad_ascent"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"

    def term(self) -> Term:
        """L."""
        return Term(Kind.ASCENT)


@register_objective
@dataclass(frozen=True, kw_only=True)
class GradDiff(GradAscent):
    """gamma · mean over label tokens of ℓ + alpha · retain NLL (arXiv 2401.06121, section 4)."""

    alpha: float = 1.0

    name: ClassVar[str] = "graddiff"


@register_objective
@dataclass(frozen=True, kw_only=True)
class IdkNLL(Objective):
    """gamma · NLL of the alternate answers to the forget questions, refusals, + alpha · retain NLL.

    Source: arXiv 2401.06121, section 4.
    """

    name: ClassVar[str] = "idk_nll"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"
    forget_data: ClassVar[Literal["answer", "alternate", "both"]] = "alternate"

    def term(self) -> Term:
        """−L."""
        return Term(Kind.NLL)


@register_objective
@dataclass(frozen=True, kw_only=True)
class NPO(Objective):
    """gamma · mean over sequences of −(2/β) log σ(−β (L − L_ref)) + alpha · retain NLL.

    Negative preference optimization (Zhang et al. 2024, arXiv 2404.05868, equation 3). With β → 0 it becomes gradient
    ascent; L falls only until L ≪ L_ref.
    """

    beta: float = 0.1

    name: ClassVar[str] = "npo"
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)

    def term(self) -> Term:
        """Of a sequence and its reference."""
        return Term(Kind.NPO, beta=self.beta)


@register_objective
@dataclass(frozen=True, kw_only=True)
class SimNPO(Objective):
    """gamma · mean over sequences of −(2/β) log σ(β (−L/n − δ)) + alpha · retain NLL.

    NPO without a reference model, normalised by length (Fan et al. 2024, arXiv 2410.07163, equation 4): the reward is
    the mean token loss, and δ its margin.
    """

    beta: float = 4.5
    delta: float = 0.0
    gamma: float = 0.125

    name: ClassVar[str] = "simnpo"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)
        check_finite("delta", self.delta)

    def term(self) -> Term:
        """Of a sequence."""
        return Term(Kind.SIMNPO, beta=self.beta, delta=self.delta)


@register_objective
@dataclass(frozen=True, kw_only=True)
class DPO(Objective):
    """gamma · mean over pairs of −(2/β) log σ(β [(L_w − L_w,ref) − (L_l − L_l,ref)]) + alpha · retain NLL.

    Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, equation 7): the alternate answer w over l,
    the one to forget. IdkDPO prefers "I don't know" (TOFU, arXiv 2401.06121), AltPO a plausible other answer (arXiv
    2409.13474).
    """

    beta: float = 0.1

    name: ClassVar[str] = "dpo"
    forget_data: ClassVar[Literal["answer", "alternate", "both"]] = "both"
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)

    def term(self) -> Term:
        """Of a forget sequence and its alternate, which follows it."""
        return Term(Kind.DPO, beta=self.beta)


@register_objective
@dataclass(frozen=True, kw_only=True)
class WGA(Objective):
    """gamma · mean over label tokens of p^β ℓ, with p as a constant, + alpha · retain NLL.

    Weighted gradient ascent: tokens that the model no longer knows stop pushing (Wang et al. 2025, arXiv 2502.19301).
    β = 0 is gradient ascent.
    """

    beta: float = 1.0

    name: ClassVar[str] = "wga"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("beta", self.beta)

    def term(self) -> Term:
        """Σ over the labels of a sequence."""
        return Term(Kind.WGA, beta=self.beta)


@register_objective
@dataclass(frozen=True, kw_only=True)
class SatImp(Objective):
    """gamma · mean over label tokens of p^β₁ (1 − p)^β₂ ℓ, with p as a constant, + alpha · retain NLL.

    Gradient ascent weighted by saturation and importance (Yang et al. 2025, arXiv 2505.11953).
    """

    beta1: float = 5.0
    beta2: float = 1.0
    gamma: float = 0.1

    name: ClassVar[str] = "satimp"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("beta1", self.beta1)
        check_not_negative("beta2", self.beta2)

    def term(self) -> Term:
        """Σ over the labels of a sequence."""
        return Term(Kind.SATIMP, beta1=self.beta1, beta2=self.beta2)


@register_objective
@dataclass(frozen=True, kw_only=True)
class CEU(Objective):
    """gamma · mean over label tokens, but the first ones of an answer, of −log(1 − p) + alpha · retain NLL.

    CE-U: cross entropy to what the model itself says without the true token (Yang 2025, arXiv 2503.01224), but for the
    entropy of that target, which has no gradient.

    Attributes:
        ignore_first_n_answer_tokens: which stand neither in the sum nor in the mean.
    """

    alpha: float = 0.0
    ignore_first_n_answer_tokens: int = 1

    name: ClassVar[str] = "ceu"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("ignore_first_n_answer_tokens", self.ignore_first_n_answer_tokens)

    def term(self) -> Term:
        """Σ over the labels of a sequence that count."""
        return Term(Kind.CEU, ignored=self.ignore_first_n_answer_tokens)

    def forget_weight(self, totals: StepTotals) -> float:
        """Gamma divided by the label tokens that count."""
        return self.gamma / max(totals.forget_tokens_after(self.ignore_first_n_answer_tokens), 1)


@dataclass(frozen=True, kw_only=True)
class FunctionObjective(Objective):
    """gamma · mean over sequences of ``function(sequences)`` + alpha · retain loss: an objective of your own.

    Attributes:
        function: maps ``efface_kernels.Sequences`` of s sequences to their loss terms (s,): plain torch, differentiable
            in their log-probabilities; called once a micro-batch or oftener, with whole sequences.
        reads_reference: whether it reads ``sequences.reference_sums``.
    """

    function: Callable[[Sequences], Tensor]
    reads_reference: bool = False

    name: ClassVar[str] = "function"

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """See ``reads_reference``."""
        return self.reads_reference

    def forget_terms(self, sequences: Sequences) -> Tensor:
        """Call the function."""
        return self.function(sequences)


def as_objective(objective: object) -> Objective:
    """Return an objective that is given as itself, by name, as a class with defaults, or as a function of its terms.

    Raises:
        TypeError: anything else; a class with a parameter that has no default.
        ValueError: a name of none.
    """
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, str):
        return get_objective(objective)
    if isinstance(objective, type) and issubclass(objective, Objective):
        try:
            return objective()
        except TypeError as error:
            name = objective.__name__
            raise TypeError(f"`objective`: expected {name}(...), with its parameters, got the class: {error}") from None
    if isinstance(objective, type) or not callable(objective):
        got = objective.__name__ if isinstance(objective, type) else type(objective).__name__
        raise TypeError(
            "`objective`: expected an efface.Objective such as NPO(beta=0.1), its class or name, or a function of "
            f"efface_kernels.Sequences, got {got}"
        )
    return FunctionObjective(function=objective)
