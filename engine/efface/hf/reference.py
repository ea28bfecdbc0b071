"""The frozen model that objectives compare with: which kind of it a run has."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from efface.batching import PackedBatch, Role, TokenStore
from efface.hf.adapters import AdapterReference
from efface.hf.live_reference import LiveReference, ModelReference
from efface.hf.score import store_logprobs
from efface.objectives import Objective

KINDS = ("auto", "cached", "live", "adapter")


class CachedReference:
    """L_ref of every forget sequence, computed once; the reference model is not needed afterwards.

    The ranks of a distributed run share the work, and all know all sums.
    """

    def __init__(
        self, model: PreTrainedModel, stores: dict[Role, TokenStore], *, rank: int = 0, world_size: int = 1
    ) -> None:
        self._sums: dict[Role, Tensor] = {}
        for role, store in stores.items():
            name = role.name.lower()
            sums = store_logprobs(model, store, name=name, rank=rank, world_size=world_size).to(model.device)
            if world_size > 1:
                torch.distributed.all_reduce(sums)
            self._sums[role] = sums

    def sums(self, batch: PackedBatch) -> Tensor:
        """Return (S,) on the batch's device: L_ref of its forget and alternate sequences, 0 for the others."""
        total = torch.zeros((), device=batch.sequences.device)
        self._sums = {role: sums.to(batch.sequences.device) for role, sums in self._sums.items()}
        for role, sums in self._sums.items():
            own = batch.roles == role
            # The index of another store's sequence is no index here.
            total = total + torch.where(own, sums[torch.where(own, batch.sequences, 0)], 0)
        return total


def reference_kind(kind: str, objective: Objective, *, padded: bool = False) -> str | None:
    """Return the kind of reference that ``objective`` will use, None where it uses none.

    ``padded`` steps, those of open-unlearning, run the model.

    Raises:
        ValueError: a kind that is not known, or that cannot serve the objective.
    """
    if kind not in KINDS:
        raise ValueError(f"`reference`: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if objective.needs_reference_model() or (padded and objective.needs_reference):
        if kind == "cached":
            raise ValueError(
                f"`reference`: {objective.name} (retain_loss_type={objective.retain_loss_type}"
                f"{', compat' if padded else ''}) compares more than log-probabilities with the frozen model's, which "
                "nobody caches; give 'live', or 'adapter' for a LoRA model"
            )
        return "live" if kind == "auto" else kind
    if not objective.needs_reference:
        return None
    return "cached" if kind == "auto" else kind


def make_reference(
    kind: str,
    policy: PreTrainedModel,
    reference_model: PreTrainedModel | None,
    stores: dict[Role, TokenStore],
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> CachedReference | ModelReference:
    """Return the reference of the given kind; without a ``reference_model`` it is the policy as it is now.

    Args:
        kind: what ``reference_kind`` returned.
        policy: the model in training.
        reference_model: another model, or None.
        stores: the sequences whose log-probabilities are compared, by role.
        device: where a live reference runs.
        rank: this process.
        world_size: of how many.
    """
    if kind == "adapter":
        if reference_model is not None:
            raise ValueError(
                "reference 'adapter' is the policy without its adapters: expected no `reference_model`, got one; use "
                "'cached' or 'live' with it"
            )
        return AdapterReference(policy)
    if kind == "cached":
        return CachedReference(reference_model or policy, stores, rank=rank, world_size=world_size)
    return LiveReference(copy.deepcopy(policy) if reference_model is None else reference_model, device)
