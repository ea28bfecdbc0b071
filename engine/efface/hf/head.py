"""The fused head: a causal language model whose forward pass can end in the loss op instead of in logits.

``fuse`` swaps the classes of the model and of its ``lm_head`` in place: same parameters, same state dict, tied weights
stay tied. Called as before, the model is what it was. Called with ``batch=PackedBatch``, it runs the decoder over the
pack and then the head on the label rows alone. All of it happens inside the model's forward call, so that whatever
wraps the model (DDP, FSDP, autocast) sees it as any other forward.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from efface.batching import PackedBatch
from efface.hf.attention import packed_arguments, use_packed_attention
from efface_kernels import Head, ReferenceRows, SequenceLossOutput, linear_logprob, linear_sequence_loss
from efface_kernels.linear_loss.sequence_loss import TermFunction

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class HeadLoss:
    """What the head computes on the label rows of a packed batch; without ``terms``, their log-probabilities."""

    terms: TermFunction | None = None
    reference: ReferenceRows | None = None
    reference_sums: Tensor | None = None
    chunk_rows: int | None = None
    backend: str = "auto"


class FusedHead(nn.Linear):
    """An ``lm_head`` that is the linear layer it was, and with ``batch`` and ``loss`` the loss op."""

    softcap: float | None

    def forward(  # type: ignore[override]
        self, hidden: Tensor, batch: PackedBatch | None = None, loss: HeadLoss | None = None
    ) -> Tensor | SequenceLossOutput:
        """Return logits (…, V); or for ``hidden`` (N, D) of ``batch``'s label rows, what ``loss`` asks for."""
        if batch is None or loss is None:
            return super().forward(hidden)
        shared: dict[str, Any] = {
            "bias": self.bias,
            "softcap": self.softcap,
            "chunk_rows": loss.chunk_rows,
            "backend": loss.backend,
        }
        if loss.terms is None:
            return linear_logprob(hidden, self.weight, batch.targets, **shared)
        return linear_sequence_loss(
            hidden,
            self.weight,
            batch.targets,
            batch.row_offsets,
            loss.terms,
            reference=loss.reference,
            reference_sums=loss.reference_sums,
            **shared,
        )


class _FusedModel:
    """Mixed in before a model's own class by ``fuse``."""

    def forward(self, *args: Any, batch: PackedBatch | None = None, loss: HeadLoss | None = None, **kwargs: Any) -> Any:
        if batch is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        head = self.get_output_embeddings()  # type: ignore[attr-defined]
        return head(packed_hidden(self, batch), batch, loss or HeadLoss())  # type: ignore[arg-type]


def packed_hidden(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Return the final hidden states (N, D) of the batch's label rows."""
    decoder = model.get_decoder()
    if decoder is model:  # what transformers 4 answers for models (GPT-NeoX) that do not name theirs
        decoder = model.base_model
    hidden: Tensor = decoder(**packed_arguments(model, batch)).last_hidden_state  # (1, T, D)
    return hidden[0].index_select(0, batch.label_rows)


def head_of(model: PreTrainedModel) -> Head:
    """Return the model's head as the loss op takes it.

    Raises:
        ValueError: a head that the loss op cannot serve, with the reason.
    """
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if type(layer) not in (nn.Linear, FusedHead):
        kind = "none" if layer is None else f"{type(layer).__module__}.{type(layer).__qualname__}"
        raise ValueError(
            f"{type(model).__name__}: expected an lm_head of class torch.nn.Linear, got {kind}; merge or remove "
            "adapters and quantisation on the head"
        )
    for attribute in ("logits_scaling", "logit_scale", "output_multiplier_scale"):
        scale = getattr(config, attribute, None)
        if scale not in (None, 1, 1.0):
            raise ValueError(
                f"{type(model).__name__}: its config scales the logits ({attribute}={scale}), which the loss op does "
                "not do; use a model without that setting"
            )
    return Head(layer.weight, layer.bias, getattr(config, "final_logit_softcapping", None))


def fuse(model: Model, *, attention: str | None = None) -> Model:
    """Give ``model`` the fused head, in place, and return it. Fusing twice changes nothing.

    Args:
        model: an ``AutoModelForCausalLM``.
        attention: attention implementation to switch to; None is packed attention where the model allows it.

    Raises:
        ValueError: a head that the loss op cannot serve.
    """
    head = head_of(model)
    if attention is None:
        use_packed_attention(model)
    else:
        model.set_attn_implementation(attention)
    if isinstance(model, _FusedModel):
        return model
    layer: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    layer.__class__ = FusedHead
    layer.softcap = head.softcap
    own = type(model)
    # The name stays, because save_pretrained writes it into config.json as the architecture.
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    model.__class__ = type(own.__name__, (_FusedModel, own), names)
    return model


def unfuse(model: Model, *, attention: str | None = "sdpa") -> Model:
    """Undo ``fuse``, in place: the model's own classes, and the given attention implementation."""
    if isinstance(model, _FusedModel):
        layer = model.get_output_embeddings()
        del layer.softcap
        layer.__class__ = nn.Linear
        model.__class__ = type(model).__mro__[2]
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


@torch.no_grad()
def reference_rows(model: PreTrainedModel, batch: PackedBatch) -> ReferenceRows:
    """Run a frozen reference model over the forget part of ``batch``: what NPO's live reference reads."""
    return ReferenceRows(packed_hidden(model, batch.forget_part()), head_of(model))
