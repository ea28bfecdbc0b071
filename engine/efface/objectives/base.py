"""What an objective is: per-sequence loss terms, and means that run over the whole optimizer step."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from efface.batching.roles import Role, StepTotals
from efface_kernels import Sequences


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """loss = gamma · mean(forget terms) + alpha · NLL of the retain label tokens.

    Parameter names are those of open-unlearning. A subclass sets the class variables and ``forget_terms``.

    Attributes:
        gamma: weight of the forget term.
        alpha: weight of the retain term; 0 needs no retain data.
        name: what the command line calls it.
        mean_over: what the mean of the forget terms runs over, sequences or label tokens of the step.
        needs_reference: whether ``Sequences.reference_sums`` is read.
    """

    gamma: float = 1.0
    alpha: float = 1.0

    name: ClassVar[str]
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "sequences"
    needs_reference: ClassVar[bool] = False

    @abstractmethod
    def forget_terms(self, sequences: Sequences) -> Tensor:
        """Return the loss terms (s,) of forget sequences, not yet divided by what the mean runs over."""

    def forget_weight(self, totals: StepTotals) -> float:
        """Gamma divided by what the forget mean of this step runs over."""
        count = totals.forget_sequences if self.mean_over == "sequences" else totals.forget_tokens
        return self.gamma / max(count, 1)

    def retain_weight(self, totals: StepTotals) -> float:
        """Alpha divided by the retain label tokens of this step."""
        return self.alpha / max(totals.retain_tokens, 1)


def nll_terms(sequences: Sequences) -> Tensor:
    """−L_s. Divided by the label tokens it is the cross entropy of a Hugging Face causal language model."""
    return -sequences.sums


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is positive."""
    if not value > 0:
        raise ValueError(f"`{name}`: expected a positive number, got {value}")


@dataclass(frozen=True)
class StepTerms:
    """The loss terms of a batch that mixes forget and retain sequences; what ``linear_sequence_loss`` calls.

    Attributes:
        objective: whose terms; None where every sequence is plain NLL (fine-tuning).
        roles: (S,) int8 on the device, a ``Role`` for each sequence of the batch.
        totals: of the optimizer step.
    """

    objective: Objective | None
    roles: Tensor
    totals: StepTotals

    def __call__(self, sequences: Sequences) -> Tensor:
        """Weighted terms (s,); their sum over the micro-batches of a step, on all ranks, is the step's loss."""
        roles = sequences.own(self.roles)
        retain_weight = 1 / max(self.totals.retain_tokens, 1)
        if self.objective is not None:
            retain_weight = self.objective.retain_weight(self.totals)
        terms = torch.where(roles == Role.RETAIN, nll_terms(sequences) * retain_weight, 0)
        if self.objective is not None:
            forget = self.objective.forget_terms(sequences) * self.objective.forget_weight(self.totals)
            terms = torch.where(roles == Role.FORGET, forget, terms)
        return terms
