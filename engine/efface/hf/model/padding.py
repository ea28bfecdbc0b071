"""Whether a model can continue prompts of several lengths in one batch, padded on the left; measured once."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from efface.hf.model.packing import as_it_was, distinct_tokens, equal_logits, position_encodings

_MEMORY = "_efface_padding"
_PADDING, _PROMPT = 5, 8  # tokens


@dataclass(frozen=True)
class Padding:
    """What a model makes of padding on the left.

    Attributes:
        exact: whether the logits behind it are those of the prompt alone.
        limit: tokens of a sequence from which on it may change the position encoding of those beside it, or None.
        encodings: names of the modules that encode them.
    """

    exact: bool
    limit: int | None
    encodings: tuple[str, ...]

    def keeps_apart(self, lengths: Sequence[int], longest: int) -> bool:
        """Whether prompts of these lengths, up to ``longest`` tokens with their answers, are to run one by one."""
        return (not self.exact and len(set(lengths)) > 1) or (self.limit is not None and longest >= self.limit)


def padding_of(model: PreTrainedModel) -> Padding:
    """Return what ``model`` makes of padding on the left; its copies know it, too. Two tiny passes, the first time."""
    known: Padding | None = vars(model).get(_MEMORY)
    if known is None:
        encodings, limit = position_encodings(model)
        known = Padding(_exact(model), limit, encodings)
        setattr(model, _MEMORY, known)
    return known


def accepted(model: Any) -> set[str]:
    """Return the arguments of the model's own forward; a fused model has it one class further up."""
    forwards = (_parameters(vars(owner)["forward"]) for owner in type(model).__mro__ if "forward" in vars(owner))
    return next((names for names in forwards if "input_ids" in names), set())


def _exact(model: PreTrainedModel) -> bool:
    with as_it_was(model):
        ids = distinct_tokens(model)[None, : _PADDING + _PROMPT]
        alone = _last_logits(model, {"input_ids": ids[:, _PADDING:]})
        mask = torch.ones_like(ids)
        mask[:, :_PADDING] = 0
        behind = {
            "input_ids": ids * mask,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }
        reads = accepted(model)
        padded = _last_logits(model, {name: value for name, value in behind.items() if name in reads})
        return not alone.isfinite().all() or equal_logits(model, padded, alone)


def _last_logits(model: Any, arguments: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(use_cache=False, **arguments).logits
    return logits[:, -1].float()


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)
