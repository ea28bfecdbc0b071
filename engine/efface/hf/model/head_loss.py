"""The loss that the fused head computes from the label rows of a packed batch."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from efface.batching import PackedBatch, Role, StepTotals
from efface.objectives import Objective, step_terms
from efface.objectives.role_loss import HeadRows, RoleLoss
from efface_kernels import Head, ReferenceRows, accumulation_dtype, linear_sequence_loss


class StepOutput(NamedTuple):
    """The share of a micro-batch in the step's loss, with gradient, and its parts, without gradient."""

    loss: Tensor  # ()
    terms: Tensor  # (S,) weighted terms, whose sum is the loss
    sequence_logprobs: Tensor  # (S,) L_s; NaN where the loss of a sequence does not read it
    reference_sums: Tensor | None  # (S,) L_ref, 0 for sequences without a reference


@dataclass(frozen=True)
class HeadLoss:
    """The share of a micro-batch in gamma · mean(forget) + alpha · mean(retain), with means over the whole step.

    If both losses are functions of log-probabilities, forget and retain rows share one loop over the logits.

    Attributes:
        objective: the objective; None for plain NLL.
        totals: totals of the optimizer step.
        forget_reference: the frozen model's rows for the forget sequences, if the loss reads them from a running model.
        retain_reference: the frozen model's rows for the retain sequences, likewise.
        reference_sums: (S,) L_ref from a cache, used instead of ``forget_reference``.
        chunk_rows: number of rows whose logits exist at the same time; None chooses it automatically.
        backend: "auto", "native", "triton" or "torch".
    """

    objective: Objective | None
    totals: StepTotals
    forget_reference: ReferenceRows | None = None
    retain_reference: ReferenceRows | None = None
    reference_sums: Tensor | None = None
    chunk_rows: int | None = None
    backend: str = "auto"

    def __call__(self, hidden: Tensor, head: Head, batch: PackedBatch) -> StepOutput:
        """Return the loss for the hidden states (N, D) of the batch's label rows."""
        objective = self.objective
        if objective is None or (objective.forget_loss() is None and objective.retain_loss() is None):
            return self._of_logprobs(hidden, head, batch, self.reference_sums)
        outputs = []
        forget, retain, rows = batch.forget_part(), batch.retain_part(), batch.forget_rows
        if forget.lengths:
            loss, sums = objective.forget_loss(), self.reference_sums
            if loss is None:
                own = None if sums is None else sums[: len(forget.lengths)]
                outputs.append(self._of_logprobs(hidden[:rows], head, forget, own))
            else:
                weights = _weights(forget, Role.FORGET, objective.forget_weight(self.totals), hidden)
                outputs.append(self._of_rows(loss, weights, hidden[:rows], head, forget, self.forget_reference))
        if retain.lengths:
            loss = objective.retain_loss()
            if loss is None:
                outputs.append(self._of_logprobs(hidden[rows:], head, retain, None))
            else:
                weights = _weights(retain, Role.RETAIN, objective.retain_weight(self.totals), hidden)
                outputs.append(self._of_rows(loss, weights, hidden[rows:], head, retain, self.retain_reference))
        return joined(outputs)

    def _of_logprobs(self, hidden: Tensor, head: Head, part: PackedBatch, sums: Tensor | None) -> StepOutput:
        paired = self.objective is not None and self.objective.forget_data == "both"
        out = linear_sequence_loss(
            hidden,
            head.weight,
            part.targets,
            part.label_offsets,
            step_terms(self.objective, part.roles, self.totals, forgets=part.forget_sequences > 0),
            bias=head.bias,
            softcap=head.softcap,
            reference=self.forget_reference if part.forget_sequences else None,
            reference_sums=sums,
            pairs=part.forget_sequences // 2 if paired else 0,
            chunk_rows=self.chunk_rows,
            backend=self.backend,
        )
        return StepOutput(out.loss, out.terms, out.sequence_logprobs, out.reference_sums)

    def _of_rows(
        self,
        loss: RoleLoss,
        weights: Tensor,
        hidden: Tensor,
        head: Head,
        part: PackedBatch,
        reference: ReferenceRows | None,
    ) -> StepOutput:
        offsets = part.label_offsets.device
        rows = HeadRows(hidden, head, part.targets, offsets, reference, self.chunk_rows, self.backend)
        out = loss(rows, weights)
        return StepOutput(out.loss, out.terms, torch.full_like(out.terms, torch.nan), None)


def _weights(part: PackedBatch, role: Role, weight: float, hidden: Tensor) -> Tensor:
    """Return (S,) ``weight`` for sequences of the role and 0 for others, in the accumulation dtype of ``hidden``."""
    return (part.roles == role).to(accumulation_dtype(hidden.dtype)) * weight


def joined(outputs: list[StepOutput]) -> StepOutput:
    """Combine the outputs of the parts of a batch, in the given order, into one output for the batch."""
    sums = None
    if any(out.reference_sums is not None for out in outputs):
        sums = torch.cat([torch.zeros_like(o.terms) if o.reference_sums is None else o.reference_sums for o in outputs])
    return StepOutput(
        torch.stack([out.loss for out in outputs]).sum(),
        torch.cat([out.terms for out in outputs]),
        torch.cat([out.sequence_logprobs for out in outputs]),
        sums,
    )
