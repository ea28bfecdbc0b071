"""A frozen model that runs beside the policy, on the sequences whose loss reads it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from efface.batching import PackedBatch
from efface.hf.activations import answer_rows, watched
from efface.hf.head import head_of, packed_hidden, use_packed_attention
from efface_kernels import Head, ReferenceRows


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
        self._far_head: Head | None = None
        if not getattr(model, "is_quantized", False) and model.device != device:
            torch.nn.Module.to(self.model, device)
        use_packed_attention(self.model)  # refuses now what it could not serve at the first step

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
