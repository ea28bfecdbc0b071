"""RMU, representation misdirection: steering of one layer's activations (Li et al. 2024, arXiv 2403.03218)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from efface.objectives.base import RETAIN_LOSS_TYPES, Objective, register_objective


@register_objective
@dataclass(frozen=True, kw_only=True)
class RMU(Objective):
    """gamma · ‖a − steering_coeff · u‖² on the forget set + alpha · ‖a − a_ref‖² on the retain set.

    a are the activations of a module at the answer tokens, a_ref those of the frozen model, u is a random unit vector
    with entries ≥ 0. ‖·‖² is averaged over dimensions, then over a sequence's answer tokens, then over sequences.

    Attributes:
        steering_coeff: length of the steering vector.
        module_regex: regular expression for the module whose output is steered; it must match the whole name of
            exactly one module.
        trainable_params_regex: regular expressions. A parameter is trained if one of them matches its whole name.
        steering_seed: seed of the random steering vector.
        retain_loss_type: "EMBED_DIFF" for the retain term above, or "NLL" or "KL".
    """

    retain_loss_type: str = "EMBED_DIFF"
    steering_coeff: float = 2.0
    module_regex: str = r"model\.layers\.7"
    trainable_params_regex: tuple[str, ...] = (".*",)
    steering_seed: int = 0

    name: ClassVar[str] = "rmu"
    reads: ClassVar[Literal["logprobs", "logits", "activations"]] = "activations"
    retain_loss_types: ClassVar[tuple[str, ...]] = ("EMBED_DIFF", *RETAIN_LOSS_TYPES)

    @property
    def compares_activations(self) -> bool:
        """Whether the retain term reads activations of the frozen model."""
        return self.retain_loss_type == "EMBED_DIFF" and self.alpha != 0

    def needs_reference_model(self) -> bool:
        """Return whether the frozen model must run, for its activations or (KL) its distributions."""
        return self.compares_activations or super().needs_reference_model()

    def steering_vector(self, size: int) -> Tensor:
        """Return steering_coeff · u, (size,) float32, on the CPU; equal on all ranks, because the seed is fixed."""
        generator = torch.Generator().manual_seed(self.steering_seed)
        vector = torch.rand(size, generator=generator)
        return vector * (self.steering_coeff / float(vector.norm()))
