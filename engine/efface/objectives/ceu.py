"""Cross-entropy unlearning (arXiv 2503.01224)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from efface.batching.roles import StepTotals
from efface.objectives.base import Objective
from efface.objectives.registry import register_objective
from efface_kernels import Sequences
from efface_kernels.linear_loss.sequences import segment_sums


def ceu_terms(sequences: Sequences, *, ignore_first_n_answer_tokens: int = 1) -> Tensor:
    """Stub."""
    logprobs = sequences.logprobs
    starts = torch.repeat_interleave(
        sequences.row_offsets[:-1], sequences.row_offsets.diff(), output_size=len(logprobs)
    )
    place = torch.arange(len(logprobs), device=logprobs.device) - starts
    values = -(-logprobs.clamp(max=-1e-6).expm1()).log()
    return segment_sums(torch.where(place >= ignore_first_n_answer_tokens, values, 0), sequences.row_offsets)


@register_objective
@dataclass(frozen=True, kw_only=True)
class CEU(Objective):
    """gamma · mean over label tokens, but the first ones of an answer, of −log(1 − p) + alpha · retain NLL.

    Attributes:
        ignore_first_n_answer_tokens: which stand neither in the sum nor in the mean.
    """

    alpha: float = 0.0
    ignore_first_n_answer_tokens: int = 1

    name: ClassVar[str] = "ceu"
    mean_over: ClassVar[Literal["sequences", "tokens"]] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ignore_first_n_answer_tokens < 0:
            raise ValueError(
                f"`ignore_first_n_answer_tokens`: expected at least 0, got {self.ignore_first_n_answer_tokens}"
            )

    def forget_terms(self, sequences: Sequences) -> Tensor:
        """See ``ceu_terms``."""
        return ceu_terms(sequences, ignore_first_n_answer_tokens=self.ignore_first_n_answer_tokens)

    def forget_weight(self, totals: StepTotals) -> float:
        """Gamma divided by the label tokens that count."""
        return self.gamma / max(totals.forget_tokens_after(self.ignore_first_n_answer_tokens), 1)
