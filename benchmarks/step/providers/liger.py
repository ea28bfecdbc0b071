"""open-unlearning's step with Liger-Kernel."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.models.llama import modeling_llama

from benchmarks.step.data import Padded
from benchmarks.step.providers.eager import Eager

_REPLACED = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")  # by apply_liger_kernel_to_llama, for the process


class Liger(Eager):
    """Padded, two forwards; ``apply_liger_kernel_to_llama`` on both models: RoPE, RMSNorm, SwiGLU and the fused head.

    The retain loss is the patched model's own (fused linear cross entropy, from ``labels=``). It has no logits to
    offer in training, so NPO's token losses come from the same op without reduction, on the last hidden states: 2 head
    products forward, 3 backward (logits again), where the mean has all its gradients after the forward pass.
    """

    name = "padded, Liger, live"
    devices = ("cuda",)
    needs = "liger-kernel"

    def __init__(self, policy: Any, reference: Any = None) -> None:
        from liger_kernel.transformers import (  # noqa: PLC0415 - optional
            LigerFusedLinearCrossEntropyLoss,
            apply_liger_kernel_to_llama,
        )

        super().__init__(policy, reference)
        self._token_losses = LigerFusedLinearCrossEntropyLoss(reduction="none")
        own = {name: getattr(modeling_llama, name) for name in _REPLACED}
        try:
            for model in (self.policy, self._frozen):
                apply_liger_kernel_to_llama(model=model)
            self._rope = modeling_llama.apply_rotary_pos_emb
        finally:
            for name, value in own.items():
                setattr(modeling_llama, name, value)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Liger's RoPE is a function of the whole process: the other providers keep transformers' own."""
        own = modeling_llama.apply_rotary_pos_emb
        modeling_llama.apply_rotary_pos_emb = self._rope
        try:
            yield
        finally:
            modeling_llama.apply_rotary_pos_emb = own

    def _nll(self, model: Any, batch: Padded) -> Tensor:
        """Summed token losses of each sequence."""
        hidden = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        rows, labels = hidden[:, :-1].flatten(0, 1), batch.labels[:, 1:]
        token_losses: Tensor = self._token_losses(model.lm_head.weight, rows, labels.flatten())
        return token_losses.view(labels.shape).sum(dim=-1)
