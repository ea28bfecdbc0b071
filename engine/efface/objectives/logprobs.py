"""Objectives whose forget loss is a function of log-probabilities.

The formulas and gradients are in ``efface_kernels.sequence_loss.reference``; their GPU version is in
``efface_kernels.sequence_loss.kernel``. ℓ is the log-probability of one label token and p = e^ℓ its probability. L is
the sum of ℓ over a sequence's labels, and n the number of those labels.
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

    The loss has no lower bound, so long runs destroy the model.
    """

    alpha: float = 0.0

    name: ClassVar[str] = "grad_ascent"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"

    def term(self) -> Term:
        """Return the term L of a sequence."""
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
    """gamma · NLL of alternate answers (refusals) to the forget questions + alpha · retain NLL.

    Source: arXiv 2401.06121, section 4.
    """

    name: ClassVar[str] = "idk_nll"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"
    forget_data: ClassVar[Literal["answer", "alternate", "both"]] = "alternate"

    def term(self) -> Term:
        """Return the term −L of an alternate answer."""
        return Term(Kind.NLL)


@register_objective
@dataclass(frozen=True, kw_only=True)
class NPO(Objective):
    """gamma · mean over sequences of −(2/β) log σ(−β (L − L_ref)) + alpha · retain NLL.

    Negative preference optimization (Zhang et al. 2024, arXiv 2404.05868, equation 3). As β → 0 it becomes gradient
    ascent. Its gradient vanishes once L ≪ L_ref, so L does not fall without limit.
    """

    beta: float = 0.1

    name: ClassVar[str] = "npo"
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)

    def term(self) -> Term:
        """Return the term of a sequence, which reads L and L_ref."""
        return Term(Kind.NPO, beta=self.beta)


@register_objective
@dataclass(frozen=True, kw_only=True)
class SimNPO(Objective):
    """gamma · mean over sequences of −(2/β) log σ(β (−L/n − δ)) + alpha · retain NLL.

    NPO without a reference model, normalised by length (Fan et al. 2024, arXiv 2410.07163, equation 4). The reward is
    the mean token loss −L/n, and δ is its margin.
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
        """Return the term of a sequence, which reads L and n."""
        return Term(Kind.SIMNPO, beta=self.beta, delta=self.delta)


@register_objective
@dataclass(frozen=True, kw_only=True)
class DPO(Objective):
    """gamma · mean over pairs of −(2/β) log σ(β [(L_w − L_w,ref) − (L_l − L_l,ref)]) + alpha · retain NLL.

    Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, equation 7), in which the alternate answer w
    is preferred to the answer to forget, l. In IdkDPO, w is "I don't know" (TOFU, arXiv 2401.06121). In AltPO, w is
    another plausible answer (arXiv 2409.13474).
    """

    beta: float = 0.1

    name: ClassVar[str] = "dpo"
    forget_data: ClassVar[Literal["answer", "alternate", "both"]] = "both"
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)

    def term(self) -> Term:
        """Return the term of a pair: a forget sequence and its alternate, which follows it in the batch."""
        return Term(Kind.DPO, beta=self.beta)


@register_objective
@dataclass(frozen=True, kw_only=True)
class WGA(Objective):
    """gamma · mean over label tokens of p^β ℓ, with p as a constant, + alpha · retain NLL.

    Weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301): the weight p^β of a token goes to 0 once the model
    has forgotten the token. With β = 0 it is gradient ascent.
    """

    beta: float = 1.0

    name: ClassVar[str] = "wga"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("beta", self.beta)

    def term(self) -> Term:
        """Return the term of a sequence, a sum over its labels."""
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
        """Return the term of a sequence, a sum over its labels."""
        return Term(Kind.SATIMP, beta1=self.beta1, beta2=self.beta2)


@register_objective
@dataclass(frozen=True, kw_only=True)
class CEU(Objective):
    """gamma · mean of −log(1 − p) over label tokens except the first ones of each answer + alpha · retain NLL.

    CE-U (Yang 2025, arXiv 2503.01224): the cross entropy to the model's own distribution with the true token removed,
    minus the entropy of that target distribution, which has no gradient.

    Attributes:
        ignore_first_n_answer_tokens: number of tokens at the start of each answer that are left out of the mean.
    """

    alpha: float = 0.0
    ignore_first_n_answer_tokens: int = 1

    name: ClassVar[str] = "ceu"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("ignore_first_n_answer_tokens", self.ignore_first_n_answer_tokens)

    def term(self) -> Term:
        """Return the term of a sequence, a sum over its labels after the ignored ones."""
        return Term(Kind.CEU, ignored=self.ignore_first_n_answer_tokens)

    def forget_weight(self, totals: StepTotals) -> float:
        """Return gamma divided by the number of forget label tokens of the step that are not ignored."""
        return self.gamma / max(totals.forget_tokens_after(self.ignore_first_n_answer_tokens), 1)


@dataclass(frozen=True, kw_only=True)
class FunctionObjective(Objective):
    """A user-defined objective: gamma · mean over sequences of ``function(sequences)`` + alpha · retain loss.

    Attributes:
        function: maps ``efface_kernels.Sequences`` of s sequences to their loss terms (s,). It is plain torch,
            differentiable with respect to the log-probabilities. It is called at least once per micro-batch, always
            with whole sequences.
        reads_reference: whether the function reads ``sequences.reference_sums``.
    """

    function: Callable[[Sequences], Tensor]
    reads_reference: bool = False

    name: ClassVar[str] = "function"

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """Whether the function reads reference log-probabilities; equal to ``reads_reference``."""
        return self.reads_reference

    def forget_terms(self, sequences: Sequences) -> Tensor:
        """Return ``function(sequences)``."""
        return self.function(sequences)


def as_objective(objective: object) -> Objective:
    """Convert an objective, a registered name, an ``Objective`` class or a function of ``Sequences`` to an objective.

    A class is instantiated with its default parameters. A function becomes a ``FunctionObjective``.

    Raises:
        TypeError: if ``objective`` is anything else, or a class with a parameter that has no default.
        ValueError: if no objective is registered under the name.
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
            raise TypeError(
                f"`objective`: expected an instance {name}(...) with its parameters, got the class: {error}"
            ) from None
    if isinstance(objective, type) or not callable(objective):
        got = objective.__name__ if isinstance(objective, type) else type(objective).__name__
        raise TypeError(
            "`objective`: expected an efface.Objective such as NPO(beta=0.1), its class or name, or a function of "
            f"efface_kernels.Sequences, got {got}"
        )
    return FunctionObjective(function=objective)
