"""The loss of a micro-batch: an objective, the means of its step, and what it reads of a reference."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from efface.batching import PackedBatch, StepTotals
from efface.hf.activations import ActivationLoss
from efface.hf.cached_reference import CachedReference
from efface.hf.head_loss import HeadLoss
from efface.hf.live_reference import ModelReference
from efface.objectives import RMU, Objective


def step_loss(
    objective: Objective | None,
    reference: CachedReference | ModelReference | None,
    batch: PackedBatch,
    totals: StepTotals,
    *,
    autocast: Callable[[], AbstractContextManager[object]],
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> HeadLoss | ActivationLoss:
    """Run the reference where the objective reads it, and return what the model's forward call then computes.

    Args:
        objective: None for plain NLL.
        reference: None where the objective reads none.
        batch: the micro-batch.
        totals: of the optimizer step.
        autocast: the precision in which the policy runs, and so the reference.
        chunk_rows: rows of logits alive at a time; None chooses.
        backend: "auto", "native", "triton" or "torch".
    """
    forget_rows = retain_rows = sums = None
    if objective is not None and isinstance(reference, ModelReference):
        with autocast():
            if objective.reads_forget_reference() and batch.forget_sequences:
                forget_rows = reference.rows(batch.forget_part())
            if objective.retain_loss() is not None and (retain := batch.retain_part()).lengths:
                retain_rows = reference.rows(retain)
    elif isinstance(reference, CachedReference):
        sums = reference.sums(batch)
    if objective is not None and objective.needs_reference and forget_rows is None and sums is None:
        # Nothing in this micro-batch to compare.
        sums = torch.zeros(len(batch.lengths), device=batch.storage.device)
    head = HeadLoss(objective, totals, forget_rows, retain_rows, sums, chunk_rows, backend)
    if not isinstance(objective, RMU):
        return head
    return ActivationLoss(
        objective,
        totals,
        _frozen_activations(objective, reference, batch, autocast),
        None if objective.compares_activations or not objective.alpha else head,
    )


def _frozen_activations(
    objective: RMU,
    reference: CachedReference | ModelReference | None,
    batch: PackedBatch,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Tensor | None:
    if not objective.compares_activations or not isinstance(reference, ModelReference):
        return None
    retain = batch.retain_part()
    if not retain.lengths:
        return None
    with autocast():
        return reference.activations(retain, objective.module_regex)
