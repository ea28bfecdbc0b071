"""The fused head: a causal language model whose forward pass can end in the loss op instead of in logits.

``fuse`` swaps the classes of the model and of its ``lm_head`` in place: same parameters, same state dict, tied weights
stay tied. Called as before, the model is what it was. Called with ``batch=PackedBatch``, it runs the decoder over the
pack and then the head on the label rows alone. All of it happens inside the model's forward call, so that whatever
wraps the model (DDP, FSDP, autocast) sees it as any other forward.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from efface.batching import PackedBatch, TokenTree
from efface.hf.activations import ActivationLoss, watched
from efface.hf.adapted_head import base_of, head_linears, serve_head
from efface.hf.attention import packed_arguments, use_packed_attention
from efface.hf.compiling import uncompiled, uncompiled_frame
from efface.hf.head_loss import HeadLoss, StepOutput, joined
from efface.hf.refusals import check_packable, check_servable
from efface_kernels import Head, linear_logprob

Model = TypeVar("Model", bound=PreTrainedModel)


class FusedHead(nn.Linear):
    """An ``lm_head`` that is the linear layer it was, and with ``batch`` the loss op."""

    softcap: float | None

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        batch: PackedBatch | None = None,
        loss: HeadLoss | None = None,
        weight: Tensor | None = None,
    ) -> Tensor | StepOutput:
        """Return logits (…, V); or for ``hidden`` (N, D) of a batch's label rows their log-probabilities, or a loss.

        A ``weight`` stands in for the layer's own: ``ServedHead``'s, where LoRA widens it.
        """
        if batch is None:
            return super().forward(hidden)
        head = Head(self.weight if weight is None else weight, self.bias, self.softcap)
        if loss is None:
            return linear_logprob(hidden, head.weight, batch.targets, bias=head.bias, softcap=head.softcap)
        return loss(hidden, head, batch)


PLAIN = (nn.Linear, FusedHead)


class _FusedModel:
    """Mixed in before a model's own class by ``fuse``."""

    def forward(
        self, *args: Any, batch: PackedBatch | None = None, loss: HeadLoss | ActivationLoss | None = None, **kwargs: Any
    ) -> Any:
        if batch is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return _packed_forward(self, batch, loss)


# torch.compile takes the decoder that this calls; lengths and losses, which change with every batch, stay out of it.
@uncompiled_frame
def _packed_forward(model: Any, batch: PackedBatch, loss: HeadLoss | ActivationLoss | None) -> Any:
    if not isinstance(loss, ActivationLoss):
        return _loss_of(model, packed_hidden(model, batch), batch, loss)
    with watched(model, loss.objective.module_regex) as watch:
        hidden = packed_hidden(model, batch)
    return _activation_loss_of(model, hidden, watch.output()[0], batch, loss)


@uncompiled
def _loss_of(model: Any, hidden: Tensor, batch: PackedBatch, loss: HeadLoss | None) -> Any:
    head = serve_head(model.get_output_embeddings(), PLAIN)
    return head.linear(hidden, batch, loss, head.weight)


@uncompiled
def _activation_loss_of(
    model: Any, hidden: Tensor, activations: Tensor, batch: PackedBatch, loss: ActivationLoss
) -> StepOutput:
    outputs = loss(activations, batch)
    if loss.retain is not None and (retain := batch.retain_part()).lengths:
        outputs.append(_loss_of(model, hidden[batch.forget_rows :], retain, loss.retain))
    return joined(outputs)


def decoder_of(model: PreTrainedModel) -> Any:
    """Return the part of the model that ends in the final hidden states."""
    decoder = model.get_decoder()
    if decoder is model:  # what transformers 4 answers for models (GPT-NeoX) that do not name theirs
        return model.base_model
    return decoder


@uncompiled_frame
def packed_hidden(model: PreTrainedModel, batch: PackedBatch | TokenTree) -> Tensor:
    """Return the final hidden states (N, D) of the batch's label rows, scaled as the model scales its logits.

    With LoRA on the head they are (N, D + r).
    """
    model = base_of(model)
    hidden: Tensor = decoder_of(model)(**packed_arguments(model, batch)).last_hidden_state  # (1, T, D)
    return _at_the_head(model, hidden[0], batch.label_rows)


@uncompiled
def _at_the_head(model: PreTrainedModel, hidden: Tensor, label_rows: Tensor) -> Tensor:
    """Return hidden states (T, D) as the head takes them, (N, D)."""
    rows = serve_head(model.get_output_embeddings(), PLAIN).widen(hidden.index_select(0, label_rows))
    scale = _logit_scale(model)
    return rows if scale == 1 else rows * scale  # (s h) Wᵀ = s (h Wᵀ): the head itself need not know


def _logit_scale(model: PreTrainedModel) -> float:
    """Return what the model multiplies its logits by: Granite and Cohere do."""
    config = model.config.get_text_config()
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)


def head_of(model: PreTrainedModel) -> Head:
    """Return the model's head as the loss op takes it.

    Raises:
        ValueError: a head that the loss op cannot serve, with the reason.
    """
    model = base_of(model)
    head, config = serve_head(model.get_output_embeddings(), PLAIN), model.config.get_text_config()
    if head.linear.bias is not None and _logit_scale(model) != 1:
        raise ValueError(f"{type(model).__name__}: a head with a bias whose logits are scaled is not served")
    return Head(head.weight, head.linear.bias, getattr(config, "final_logit_softcapping", None))


def fuse(model: Model, *, attention: str | None = None) -> Model:
    """Give ``model`` the fused head, in place, and return it. Fusing twice changes nothing.

    Args:
        model: an ``AutoModelForCausalLM``, or a ``peft.PeftModel`` around one.
        attention: attention implementation to switch to; None is packed attention where the model allows it.

    Raises:
        ValueError: a head that the loss op cannot serve; recurrent layers, virtual tokens, a router's auxiliary loss.
    """
    base = base_of(model)
    head = head_of(base)
    check_servable(model, base)
    check_packable(base)
    if not isinstance(base, _FusedModel):
        _check_logits(base, head)
    if attention is None:
        use_packed_attention(base)
    else:
        base.set_attn_implementation(attention)
    linears: list[Any] = head_linears(base.get_output_embeddings())
    for layer in linears:
        layer.__class__ = FusedHead
        layer.softcap = head.softcap
    if isinstance(base, _FusedModel):
        return model
    own = type(base)
    # The name stays, because save_pretrained writes it into config.json as the architecture.
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    base.__class__ = type(own.__name__, (_FusedModel, own), names)
    return model


@torch.no_grad()
def _check_logits(model: PreTrainedModel, head: Head) -> None:
    """Raise ValueError if the model makes its logits in a way that the head knows nothing of."""
    if any(parameter.numel() == 0 or parameter.is_meta for parameter in model.parameters()):
        return  # sharded or not yet loaded
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        ids = torch.arange(2, device=model.device)[None]
        hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        hidden = _at_the_head(model, hidden, ids[0])
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        for module, mode in modes:
            module.training = mode
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias).float()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    # Loose enough for the rounding of half precision, tight enough to see a scale, a cap or a shift.
    worst, size = (logits - expected).abs().max().item(), expected.abs().max().item()
    if worst > 0.05 * size + 1e-6:
        raise ValueError(
            f"{type(model).__name__}: its logits are not those of its head on its last hidden states (they differ by "
            f"{worst:.3g}, the largest is {size:.3g}), so the loss op would train another model; its config may scale "
            "or shift logits in a way that efface does not know"
        )


def unfuse(model: Model, *, attention: str | None = "sdpa") -> Model:
    """Undo ``fuse``, in place: the model's own classes, and the given attention implementation."""
    base = base_of(model)
    if isinstance(base, _FusedModel):
        linears: list[Any] = head_linears(base.get_output_embeddings())  # type: ignore[attr-defined]
        for layer in linears:
            del layer.softcap
            layer.__class__ = nn.Linear
        base.__class__ = type(base).__mro__[2]
    if attention is not None:
        base.set_attn_implementation(attention)
    return model
