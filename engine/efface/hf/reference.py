"""The frozen model that NPO compares with: run live beside the policy, or remembered as one number a sequence."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from efface.batching import PackedBatch, Role, TokenStore
from efface.hf.attention import use_packed_attention
from efface.hf.head import head_of, reference_rows
from efface.hf.score import store_logprobs
from efface_kernels import ReferenceRows

KINDS = ("cached", "live")


class CachedReference:
    """L_ref of every forget sequence, computed once; the reference model is not needed afterwards.

    The ranks of a distributed run share the work, and all know all sums.
    """

    def __init__(self, model: PreTrainedModel, forget: TokenStore, *, rank: int = 0, world_size: int = 1) -> None:
        sums = store_logprobs(model, forget, name="forget", rank=rank, world_size=world_size).to(model.device)
        if world_size > 1:
            torch.distributed.all_reduce(sums)
        self._sums = sums

    def sums(self, batch: PackedBatch) -> Tensor:
        """Return (S,) on the batch's device: L_ref of its forget sequences, 0 for the others."""
        self._sums = self._sums.to(batch.sequences.device)
        forget = batch.roles == Role.FORGET
        # The index of another store's sequence is no index here.
        return torch.where(forget, self._sums[torch.where(forget, batch.sequences, 0)], 0)


class LiveReference:
    """A second model, run on the forget sequences of every batch; its logits are read in the policy's own pass."""

    def __init__(self, model: PreTrainedModel, *, copy_model: bool) -> None:
        self.model = copy.deepcopy(model) if copy_model else model
        self.model.requires_grad_(False)
        self.model.eval()
        use_packed_attention(self.model)
        head_of(self.model)  # refuses now what it could not serve at the first step

    def rows(self, batch: PackedBatch, device: torch.device) -> ReferenceRows:
        """Return the reference's hidden states for the batch's forget part, and its head."""
        if self.model.device != device:
            torch.nn.Module.to(self.model, device)
        return reference_rows(self.model, batch)


def make_reference(
    kind: str,
    policy: PreTrainedModel,
    reference_model: PreTrainedModel | None,
    forget: TokenStore,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> CachedReference | LiveReference:
    """Return the reference of the given kind; without a ``reference_model`` it is the policy as it is now.

    Raises:
        ValueError: a kind that is not known.
    """
    if kind == "cached":
        return CachedReference(reference_model or policy, forget, rank=rank, world_size=world_size)
    if kind == "live":
        return LiveReference(reference_model or policy, copy_model=reference_model is None)
    raise ValueError(f"`reference`: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
