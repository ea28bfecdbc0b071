"""Selection and construction of a run's reference: cached, live or adapter."""

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
    """Return the kind of reference that ``objective`` uses, or None if it uses no reference.

    Args:
        kind: "auto", "cached", "live" or "adapter". "auto" chooses the kind that needs the least memory: "cached" if
            the objective reads only log-probabilities, otherwise "adapter" for a ``peft.PeftModel`` and "live" for
            other models.
        objective: the objective.
        policy: the model in training.
        padded: whether the run uses open-unlearning's padded steps, which always run the reference model.

    Raises:
        ValueError: if the kind is unknown, or does not support the objective.
    """
    if kind not in KINDS:
        raise ValueError(f"`reference`: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if objective.needs_reference_model() or (padded and objective.needs_reference):
        if kind == "cached":
            raise ValueError(
                f"`reference`: expected 'live' or 'adapter', got 'cached', which has only log-probabilities, while "
                f"{objective.name} (retain_loss_type={objective.retain_loss_type}{', compat' if padded else ''}) reads "
                "more from the frozen model; use 'live', or 'adapter' for a LoRA model"
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
    share: bool = True,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
) -> CachedReference | ModelReference:
    """Return the reference of the given kind.

    Args:
        kind: "cached", "live" or "adapter", as returned by ``reference_kind``.
        policy: the model in training.
        reference_model: the reference model; None uses the policy as it is now.
        stores: the sequences whose reference log-probabilities are needed, by role.
        device: device of the reference model; None is the policy's device.
        cache: cache file of ``CachedReference``.
        share: argument of ``CachedReference``.
        rank: rank of this process.
        world_size: number of processes.
        progress: progress callback of ``CachedReference``.

    Raises:
        ValueError: if the kind does not fit the policy or the ``reference_model``, or for the reasons listed for
            ``CachedReference``.
        FloatingPointError: if a cached reference gives a log-probability that is not finite.
    """
    device = policy.device if device is None else device
    if reference_model is not None and not {*map(id, reference_model.parameters())}.isdisjoint(
        map(id, policy.parameters())
    ):
        raise ValueError(
            "`reference_model`: expected a separate model, got one that shares weights with the policy; load the model "
            "a second time, or leave `reference_model` out to use the policy as it is now"
        )
    if kind == "adapter":
        if reference_model is not None:
            raise ValueError(
                "reference 'adapter' is the policy without its adapter: expected no `reference_model`, got one; use "
                "'cached' or 'live' with that model"
            )
        return AdapterReference(policy)
    if kind == "live":
        return LiveReference(copy.deepcopy(policy) if reference_model is None else reference_model, device)
    return CachedReference(
        reference_model or policy,
        stores,
        cache=cache,
        device=device,
        share=share,
        rank=rank,
        world_size=world_size,
        progress=progress,
    )
