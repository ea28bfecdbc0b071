"""The frozen model that objectives compare with: run beside the policy, or remembered as one number a sequence."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from efface.batching import PackedBatch, Role, TokenStore
from efface.hf.activations import answer_rows, watched
from efface.hf.attention import use_packed_attention
from efface.hf.head import head_of, packed_hidden
from efface.hf.score import store_logprobs
from efface.objectives import Objective
from efface_kernels import Head, ReferenceRows

KINDS = ("auto", "cached", "live")


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


class ModelReference(ABC):
    """A frozen model that runs, beside the policy, on the sequences whose loss reads it."""

    @abstractmethod
    def running(self) -> AbstractContextManager[PreTrainedModel]:
        """Hand out the frozen model for a forward pass."""

    @torch.no_grad()
    def rows(self, batch: PackedBatch) -> ReferenceRows:
        """Return its hidden states for the label rows of a pack, and its head, on the pack's device."""
        device = batch.storage.device
        with self.running() as model:
            hidden = packed_hidden(model, batch.to(model.device)).to(device)
            return ReferenceRows(hidden, self._head(model, device))

    @torch.no_grad()
    def activations(self, batch: PackedBatch, module_regex: str) -> Tensor:
        """Return what the module of that name puts out at the answer tokens of a pack, (N, D)."""
        with self.running() as model, watched(model, module_regex) as watch:
            own = batch.to(model.device)
            packed_hidden(model, own)
            return answer_rows(watch.output()[0], own).to(batch.storage.device)

    def _head(self, model: PreTrainedModel, device: torch.device) -> Head:
        return head_of(model)


class LiveReference(ModelReference):
    """A second model.

    Args:
        model: frozen and put into evaluation mode here.
        device: where it runs; its head is copied to the policy's device if that is another one. Quantised models stay
            where they are.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model = model
        self.model.requires_grad_(False)
        self.model.eval()
        use_packed_attention(self.model)
        head_of(self.model)  # refuses now what it could not serve at the first step
        self._far_head: Head | None = None
        if not getattr(model, "is_quantized", False) and model.device != device:
            torch.nn.Module.to(self.model, device)

    @contextmanager
    def running(self) -> Iterator[PreTrainedModel]:
        """Hand out the model."""
        yield self.model

    def _head(self, model: PreTrainedModel, device: torch.device) -> Head:
        if model.device == device:
            return head_of(model)
        if self._far_head is None:
            self._far_head = head_of(model).to(device)
        return self._far_head


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
    if kind == "cached":
        return CachedReference(reference_model or policy, stores, rank=rank, world_size=world_size)
    return LiveReference(copy.deepcopy(policy) if reference_model is None else reference_model, device)
