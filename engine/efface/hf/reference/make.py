"""Which kind of reference a run has, and that reference."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from efface.batching import Role, TokenStore
from efface.hf.model.adapted_head import base_of
from efface.hf.reference.cached import NO_FILE, CachedReference, Progress
from efface.hf.reference.live import AdapterReference, LiveReference, ModelReference
from efface.objectives import Objective

KINDS = ("auto", "cached", "live", "adapter")


def reference_kind(kind: str, objective: Objective, policy: Any, *, padded: bool = False) -> str | None:
    """Return the kind of reference that ``objective`` will use, None where it uses none.

    "auto" is what needs the least memory: "cached" where log-probabilities are all that is read, else "adapter" for a
    ``peft.PeftModel`` and "live" for others. ``padded`` steps, those of open-unlearning, run the model.

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
        return kind if kind != "auto" else "live" if base_of(policy) is policy else "adapter"
    if not objective.needs_reference:
        return None
    return "cached" if kind == "auto" else kind


def make_reference(
    kind: str,
    policy: PreTrainedModel,
    reference_model: PreTrainedModel | None,
    stores: Mapping[Role, TokenStore],
    *,
    device: torch.device | None = None,
    cache: str | None = NO_FILE,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
) -> CachedReference | ModelReference:
    """Return the reference of the given kind; without a ``reference_model`` it is the policy as it is now.

    Args:
        kind: what ``reference_kind`` returned.
        policy: the model in training.
        reference_model: another model, or None.
        stores: the sequences whose log-probabilities are compared, by role.
        device: where a reference model runs; None is where the policy is.
        cache: as of ``CachedReference``, and so are those below.
        rank: this process.
        world_size: of how many.
        progress: follows a cached reference.

    Raises:
        ValueError: a kind that the policy or a ``reference_model`` does not go with; as ``CachedReference``.
    """
    device = policy.device if device is None else device
    if reference_model is not None and not {*map(id, reference_model.parameters())}.isdisjoint(
        map(id, policy.parameters())
    ):
        raise ValueError(
            "`reference_model`: expected a model of its own, got one that shares weights with the policy, which are "
            "trained or lie under its adapters; load it a second time, or leave it out: then it is the policy as it is "
            "now"
        )
    if kind == "adapter":
        if reference_model is not None:
            raise ValueError(
                "reference 'adapter' is the policy without its adapters: expected no `reference_model`, got one; use "
                "'cached' or 'live' with it"
            )
        return AdapterReference(policy)
    if kind == "live":
        return LiveReference(copy.deepcopy(policy) if reference_model is None else reference_model, device)
    return CachedReference(
        reference_model or policy,
        stores,
        cache=cache,
        device=device,
        rank=rank,
        world_size=world_size,
        progress=progress,
    )
