"""open-unlearning's step with Apple's cut-cross-entropy."""

from typing import Any, ClassVar

from torch import Tensor

from benchmarks.step.data import Padded
from benchmarks.step.providers.eager import Eager


class CutCrossEntropy(Eager):
    """Padded, two forwards; both losses by ``linear_cross_entropy`` on the last hidden states, rows with labels alone.

    ``filter_eps=None``: exact. Its default drops gradients of probabilities below 2⁻¹², and under random weights that
    is nearly all of them: it would be timed for work that it leaves out.
    """

    name = "padded, cut-cross-entropy, live"
    devices = ("cuda",)
    needs = "cut-cross-entropy"
    implementation: ClassVar[str] = "cce"

    def _nll(self, model: Any, batch: Padded) -> Tensor:
        """Summed token losses of each sequence."""
        return self._cross_entropy(model, batch, "none").sum(dim=-1)

    def _retain_loss(self, batch: Padded) -> Tensor:
        return self._cross_entropy(self.policy, batch, "mean")

    def _cross_entropy(self, model: Any, batch: Padded, reduction: str) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy  # noqa: PLC0415 - optional

        hidden = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        loss: Tensor = linear_cross_entropy(
            hidden,
            model.lm_head.weight,
            batch.labels,
            shift=True,
            reduction=reduction,
            filter_eps=None,
            impl=self.implementation,
        )
        return loss.float()


class CutCompiled(CutCrossEntropy):
    """The same by its ``torch_compile`` implementation, which a CPU can run: logits of label rows, compiled."""

    name = "padded, cut-cross-entropy compiled, live"
    devices = ("cpu",)
    implementation = "torch_compile"
