"""What a provider is: a policy, perhaps a second model, and the loss of a step's pairs."""

import importlib.util
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.step.data import Step
from benchmarks.step.stopwatch import Stopwatch
from efface import NPO

OBJECTIVE = NPO(beta=0.1, alpha=1.0)
_ONLY_ON = {("cpu",): "a variant for CPUs", ("cuda",): "its kernels are Triton's, which need a GPU"}


class Provider(ABC):
    """Computes NPO's loss for the pairs of a step. Gradients come from ``backward``, as in any training loop.

    Args:
        policy: its own from now on.
        reference: the second model, likewise; None unless ``second_model``.

    Attributes:
        name: in tables.
        reference: "live" (a second model), "cached" (its log-probabilities are given) or "adapter" (the policy's base).
        lora: the policy is a ``peft.PeftModel``.
        devices: where it runs.
        needs: a package.
        ours: its loss is efface's, with the backend that "auto" chooses.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    lora: ClassVar[bool] = False
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    needs: ClassVar[str | None] = None
    ours: ClassVar[bool] = False

    def __init__(self, policy: Any, reference: Any = None) -> None:
        self.policy = policy.train()
        self._frozen = None if reference is None else reference.eval().requires_grad_(False)
        self.trained = [weight for weight in policy.parameters() if weight.requires_grad]
        self._optimizer: torch.optim.Optimizer | None = None

    @classmethod
    def second_model(cls) -> bool:
        """Whether it wants a reference model."""
        return cls.reference == "live"

    @classmethod
    def why_not(cls, device: str) -> str | None:
        """Return why it cannot run on the device, None if it can."""
        if device not in cls.devices:
            return f"{cls.name}: {_ONLY_ON[cls.devices]}"
        if cls.needs is not None and importlib.util.find_spec(cls.needs.replace("-", "_")) is None:
            return f"{cls.name}: {cls.needs} is not installed"
        return None

    @property
    def models(self) -> list[Any]:
        """The policy, and the second model if there is one."""
        return [model for model in (self.policy, self._frozen) if model is not None]

    @abstractmethod
    def loss(self, step: Step) -> Tensor:
        """Run the forward passes."""

    def active(self) -> AbstractContextManager[None]:
        """Hold what the provider changes outside its own models, forward and backward."""
        return nullcontext()

    def gradients(self, step: Step) -> Tensor:
        """Run forward and backward; return the loss. The gradients lie in the policy's parameters."""
        with self.active():
            self.policy.zero_grad(set_to_none=True)
            loss = self.loss(step)
            loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Clip the gradients and take an AdamW step, both as ``transformers.Trainer`` does by default."""
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0, fused=True)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self._optimizer.step()

    def train(self, step: Step, watch: Stopwatch) -> Tensor:
        """Take a whole training step, its parts by the watch; return the loss."""
        with self.active():
            with watch.part("loss"):
                self.policy.zero_grad(set_to_none=True)
                loss = self.loss(step)
            with watch.part("backward"):
                loss.backward()
        with watch.part("update"):
            self.update()
        watch.end_step()
        return loss.detach()
