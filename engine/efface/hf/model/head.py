"""The fused head: a causal language model whose forward pass can return the loss instead of logits.

``fuse`` swaps the classes of the model and of its ``lm_head`` in place. Parameters and state dict do not change, and
tied weights stay tied. A call without a batch works as before. A call with ``batch=PackedBatch`` runs the decoder over
the packed batch, and then the head on the label rows only. Both run inside the model's forward call, so wrappers of the
model (DDP, FSDP, autocast) work as for any other forward call.
"""

import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from efface.batching import PackedBatch
from efface.hf.model.activations import ActivationLoss, watched
from efface.hf.model.adapted_head import base_of, head_linears, serve_head
from efface.hf.model.forwards import found_forward, route, unroute, unwrapped_forward
from efface.hf.model.head_loss import HeadLoss, StepOutput, joined
from efface.hf.model.packing import HALVES, MEMORY, packed_states, read_packs, readable, reading_of
from efface.hf.model.supported import check_model, check_servable, uncompiled, uncompiled_frame
from efface_kernels import Head, linear_logprob

Model = TypeVar("Model", bound=PreTrainedModel)


class FusedHead(nn.Linear):
    """A linear ``lm_head`` that computes the loss or log-probabilities if it is called with a ``batch``."""

    softcap: float | None

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        batch: PackedBatch | None = None,
        loss: HeadLoss | None = None,
        weight: Tensor | None = None,
    ) -> Tensor | StepOutput:
        """Return logits, log-probabilities or a loss.

        Args:
            hidden: without ``batch``, hidden states (…, D), for which logits (…, V) are returned; with ``batch``, the
                hidden states (N, D) of its label rows.
            batch: the packed batch.
            loss: the loss to return; None returns the log-probabilities (N,) of the batch's labels.
            weight: weight to use instead of the layer's own: that of a ``ServedHead``, which LoRA makes wider.
        """
        if batch is None:
            return super().forward(hidden)
        head = Head(self.weight if weight is None else weight, self.bias, self.softcap)
        if loss is None:
            return linear_logprob(hidden, head.weight, batch.targets, bias=head.bias, softcap=head.softcap)
        return loss(hidden, head, batch)


PLAIN = (nn.Linear, FusedHead)


class _FusedModel:
    """Mixin that ``fuse`` puts before the model's own class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the model by its own class; pickle refuses the fused class, because it has the same name."""
        reduced: Any = super().__reduce_ex__(protocol)
        return _blank, (type(self).__mro__[2],), *reduced[2:]

    def forward(
        self, *args: Any, batch: PackedBatch | None = None, loss: HeadLoss | ActivationLoss | None = None, **kwargs: Any
    ) -> Any:
        if batch is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return _packed_forward(self, batch, loss)


# torch.compile compiles only the decoder that this function calls, because lengths and losses change with every batch.
@uncompiled_frame
def _packed_forward(model: Any, batch: PackedBatch, loss: HeadLoss | ActivationLoss | None) -> Any:
    batch = readable(model, batch)
    if not isinstance(loss, ActivationLoss):
        return _loss_of(model, packed_hidden(model, batch), batch, loss)
    with watched(model, loss.objective.module_regex) as watch:
        hidden = packed_hidden(model, batch)
    return _activation_loss_of(model, hidden, watch.output()[0], batch, loss)


@uncompiled
def _loss_of(model: Any, hidden: Tensor, batch: PackedBatch, loss: HeadLoss | None) -> Any:
    head = serve_head(model.get_output_embeddings(), PLAIN)
    layer: Any = head.linear
    if type(layer) is nn.Linear:  # resize_token_embeddings replaces an untied head with a new layer
        fuse_layer(layer, head_of(model).softcap)
    # Keyword arguments, because hooks on the head expect hidden states as its only positional argument.
    return layer(hidden, batch=batch, loss=loss, weight=head.weight)


@uncompiled
def _activation_loss_of(
    model: Any, hidden: Tensor, activations: Tensor, batch: PackedBatch, loss: ActivationLoss
) -> StepOutput:
    outputs = loss(activations, batch)
    if loss.retain is not None and (retain := batch.retain_part()).lengths:
        outputs.append(_loss_of(model, hidden[batch.forget_rows :], retain, loss.retain))
    return joined(outputs)


@uncompiled_frame
def packed_hidden(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Return the final hidden states (N, D) of the batch's label rows, multiplied by the model's logit scale.

    With LoRA on the head, the shape is (N, D + r).
    """
    model = base_of(model)
    batch = readable(model, batch)
    return _at_the_head(model, packed_states(model, batch), batch.label_rows)


@uncompiled
def _at_the_head(model: PreTrainedModel, hidden: Tensor, label_rows: Tensor) -> Tensor:
    """Select the label rows of hidden states (T, D), and cast, widen and scale them for the head: (N, D or D + r)."""
    head = serve_head(model.get_output_embeddings(), PLAIN)
    hidden, dtype = hidden.index_select(0, label_rows), head.linear.weight.dtype
    if hidden.dtype == torch.float32 and dtype in HALVES:
        hidden = hidden.to(dtype)  # Mamba's residual stream is fp32, and its own head makes the same cast
    elif dtype == torch.float32 and hidden.dtype in HALVES and not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(dtype)  # an fp32 head on a half-precision decoder; in the model, a hook on the head casts
    rows = head.widen(hidden)
    scale = _logit_scale(model)
    return rows if scale == 1 else rows * scale  # (s h) Wᵀ = s (h Wᵀ), so the head needs no scale


def _logit_scale(model: PreTrainedModel) -> float:
    """Return the factor by which the model multiplies its logits, as Granite and Cohere do; otherwise 1."""
    config = model.config.get_text_config()
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)


def head_of(model: PreTrainedModel) -> Head:
    """Return the model's head as an ``efface_kernels.Head``, the form that the loss op takes.

    Raises:
        ValueError: if the loss op does not support the head; the message gives the reason.
    """
    model = base_of(model)
    head, config = serve_head(model.get_output_embeddings(), PLAIN), model.config.get_text_config()
    if head.linear.bias is not None and _logit_scale(model) != 1:
        raise ValueError(
            f"{type(model).__name__}: expected a head without a bias if logits are scaled, got a bias; efface does not "
            "support the combination"
        )
    return Head(head.weight, head.linear.bias, _softcap(config))


def _softcap(config: Any) -> float | None:
    """Return the soft-cap of the logits, or None; Gemma, RecurrentGemma and xLSTM use different names for it."""
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return next((float(cap) for cap in (getattr(config, name, None) for name in names) if cap), None)


def fuse(model: Model, *, attention: str | None = None) -> Model:
    """Give ``model`` the fused head, in place, and return the model; fusing twice is a no-op.

    A measurement decides how the model reads packed batches (see ``efface.hf.model.packing``): with packed attention,
    with the model's own attention, or with one sequence per pass. In the last case, a warning gives the reason.

    Args:
        model: an ``AutoModelForCausalLM``, or a ``peft.PeftModel`` around one.
        attention: attention implementation to switch to; None uses packed attention if the model supports it.

    Raises:
        TypeError: if ``model`` is not a transformers model, or is wrapped by torch.compile or a parallel wrapper.
        ValueError: if the loss op does not support the head, an adapter uses virtual tokens, the model's loss has a
            router's auxiliary loss, the model is not causal or is spread over several devices, or a ``forward`` on the
            instance changes its logits.
    """
    check_model(model)
    base = base_of(model)
    head = head_of(base)
    check_servable(model, base)
    if not isinstance(base, _FusedModel):
        _check_forward(model, base)
    if attention is None and (known := reading_of(base)) is not None and known.asked:
        delattr(base, MEMORY)  # an attention chosen in an earlier call no longer applies
    use_packed_attention(base, attention=attention)
    for layer in head_linears(base.get_output_embeddings()):
        fuse_layer(layer, head.softcap)
    if not isinstance(base, _FusedModel):
        base.__class__ = _fused_class(type(base))
    route(base, inspect.signature(type(base).forward))
    return model


def _fused_class(own: type) -> Any:
    # The class keeps its name, because save_pretrained writes the name into config.json as the architecture.
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (_FusedModel, own), {**names, "forward": _forward_of(own)})


def _blank(own: type) -> Any:
    """Return an uninitialised fused model, for pickle to fill."""
    made = _fused_class(own)
    return made.__new__(made)


def fuse_layer(layer: Any, softcap: float | None) -> None:
    """Give a linear layer the class ``FusedHead``, in place."""
    layer.__class__ = FusedHead
    layer.softcap = softcap
    route(layer)


def _unfuse_layer(layer: Any) -> None:
    if hasattr(layer, "softcap"):
        unroute(layer)
        del layer.softcap
        layer.__class__ = nn.Linear


def _check_forward(model: Any, base: Any) -> None:
    """Raise ValueError if the instance has a ``forward`` that a packed call can neither use nor safely bypass."""
    for module in {id(one): one for one in (model, base)}.values():
        if unwrapped_forward(module) is not None:
            raise ValueError(
                f"{type(base).__name__}: expected a model as it was loaded, got one whose forward is wrapped by the "
                "mixed precision of an earlier Accelerator.prepare or Trainer; call `fuse` before `prepare`, or call "
                "`efface.hf.model.forwards.release(model)` and set the precision again"
            )
    if found_forward(base) is not None and any(w.is_meta or not w.numel() for w in base.parameters()):
        raise ValueError(
            f"{type(base).__name__}: expected the forward of its class, got another one on the instance. Its weights "
            "are not in this process, so efface cannot check that both give the same logits; remove the patch (del "
            "model.forward), or load the model without sharding or offloading"
        )


def _forward_of(own: type) -> Any:
    """Return ``_FusedModel.forward`` with the signature of the model's own forward, plus ``batch`` and ``loss``.

    transformers inspects the signature, for example to find out whether a model takes ``position_ids``, which
    left-padded prompts need.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _FusedModel.forward(self, *args, **kwargs)

    signature = inspect.signature(own.forward)  # type: ignore[attr-defined]
    parameters = [*signature.parameters.values()]
    added = [one for one in inspect.signature(_FusedModel.forward).parameters.values() if one.name in ("batch", "loss")]
    last = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters[:last], *added, *parameters[last:]]
    )
    return forward


def use_packed_attention(model: PreTrainedModel, *, attention: str | None = None) -> None:
    """Switch ``model``, fused or not, to the attention with which it reads packed batches; it is measured only once.

    An attention implementation chosen by the user in an earlier call stays.

    Args:
        model: a transformers model, or a ``peft.PeftModel`` around one.
        attention: attention implementation to switch to; None uses packed attention if the model supports it.

    Raises:
        ValueError: for the reasons listed for ``fuse``, except adapters and a router's auxiliary loss.
    """
    base = base_of(model)
    head = head_of(base)

    def logits(hidden: Tensor) -> Tensor:
        rows = torch.arange(len(hidden), device=hidden.device)
        made = torch.nn.functional.linear(_at_the_head(base, hidden, rows), head.weight, head.bias).float()
        return made if head.softcap is None else head.softcap * torch.tanh(made / head.softcap)

    read_packs(base, logits, attention)


def unfuse(model: Model, *, attention: str | None = "own") -> Model:
    """Undo ``fuse``, in place: restore the model's classes, set an attention implementation, and return the model.

    Args:
        model: a model from ``fuse``.
        attention: the attention implementation to set. "own" is the one that the model had before ``fuse``; None does
            not change it.
    """
    base: Any = base_of(model)
    if attention == "own":
        reading = reading_of(base)
        attention = None if reading is None else reading.own
    if isinstance(base, _FusedModel):
        fused: Any = base
        layers: list[Any] = head_linears(fused.get_output_embeddings())
        for layer in layers:
            _unfuse_layer(layer)
        unroute(fused)
        base.__class__ = type(base).__mro__[2]
    if attention is not None:
        base.set_attn_implementation(attention)
    return model
