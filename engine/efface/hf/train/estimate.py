"""What a run would need, computed from a configuration: no weights are loaded, and nothing is measured.

Bytes on the device of one process, without sharding. P parameters, P_t of them trained, b bytes of a weight, V
vocabulary, D hidden size, T tokens of a micro-batch (``token_budget``), n rows of logits alive at a time:

    weights            P b
    autocast copies    2 P, for fp32 weights in mixed precision
    gradients          P_t b
    optimizer states   P_t x what the optimizer keeps of a parameter
    reference model    live: P b; cached, adapter: 0
    logits             n V b, twice with a live reference, whose own take their place beyond the device's budget of
                       logits; with a distribution (KL, UNDIAL) both in fp32
    head gradient      V D b, + 4 V D for its fp32 sum over several chunks; with a distribution + 8 V D for fp32 heads
    activations        T (once + layers x by layer); with gradient checkpointing T (once + layers x D b + by layer)

What a layer keeps for its backward pass is counted tensor by tensor, on torch's fake tensors, which have shapes and no
contents, with an attention that keeps no scores (FlashAttention's kind).
Allocator blocks, library workspaces and the loss's small tensors are not in it.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from efface.hf.model.adapted_head import base_of
from efface.hf.model.packing import decoder_of
from efface_kernels import default_chunk_rows, logits_budget, one_chunk_is_smaller, shares_workspace

_ATTENTION = "efface_counted"
_TOKENS = 16

# Bytes of states for a trained parameter; of "weight" so many tensors like it. Of the optimizers of transformers.
_FIXED_STATES = {"32bit": 8.0, "8bit": 2.0, "4bit": 1.0}
_LIKE_THE_WEIGHT = {"adamw": 2, "nadamw": 2, "sgd": 0, "adagrad": 1, "rmsprop": 1, "lion": 1, "ademamix": 3}


@dataclass(frozen=True)
class ModelSizes:
    """What estimates need of a model.

    Attributes:
        parameters: all of them; a tied one counts once.
        computing: those that a token is multiplied with, so without embeddings: the trainer's own count.
        layers: of the decoder.
        hidden: D.
        vocabulary: V.
        kept_once: bytes a token keeps for the backward pass outside the layers.
        kept_by_layer: bytes a token keeps in a layer.
    """

    parameters: int
    computing: int
    layers: int
    hidden: int
    vocabulary: int
    kept_once: float
    kept_by_layer: float


def model_sizes(architecture: Mapping[str, Any] | Any, dtype: torch.dtype, *, autocast: bool = False) -> ModelSizes:
    """Return the sizes of a configuration, or of one in transformers' names.

    Args:
        architecture: the configuration.
        dtype: of the weights.
        autocast: whether it computes in bf16 all the same.

    Raises:
        ValueError: a configuration that transformers does not know.
    """
    config = AutoConfig.for_model(**architecture) if isinstance(architecture, Mapping) else architecture
    key = (config.to_json_string(), dtype, autocast)
    if key not in _known:
        _known[key] = _counted(config, dtype, autocast=autocast)
    return _known[key]


_known: dict[tuple[str, torch.dtype, bool], ModelSizes] = {}


def _counted(config: Any, dtype: torch.dtype, *, autocast: bool) -> ModelSizes:
    text = config.get_text_config()
    with FakeTensorMode():
        model = _made(config, dtype)
        one, two = (_kept(_made(_of_layers(config, layers), dtype), autocast=autocast) for layers in (1, 2))
    return ModelSizes(
        parameters=model.num_parameters(),
        computing=model.num_parameters(exclude_embeddings=True),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        kept_once=2 * one - two,
        kept_by_layer=two - one,
    )


def _made(config: Any, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_ATTENTION)


def _of_layers(config: Any, layers: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


class _KeptLikeFlash(torch.autograd.Function):
    """An attention of the right shapes that keeps what FlashAttention keeps: q, k, v, its output and a number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])  # (1, T, H, d)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[1:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:  # noqa: ARG004 - torch's signature
        return None, None, None


def _attention(_module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **_options: Any) -> Any:
    return _KeptLikeFlash.apply(query, key, value), None  # type: ignore[no-untyped-call]


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, lambda *_, **_options: None)


def _kept(model: Any, *, autocast: bool) -> float:
    """Return the bytes that one more token keeps for the backward pass of a model of fake tensors, but for the head's.

    One more, because weights, and copies of them that autocast makes, are kept, too, and are no token's.
    """
    few, more = (_kept_of(model, tokens, autocast=autocast) for tokens in (_TOKENS, 2 * _TOKENS))
    return (more - few) / _TOKENS


def _kept_of(model: Any, tokens: int, *, autocast: bool) -> int:
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._base is not None else tensor  # noqa: SLF001 - views share their memory
        kept[id(base)] = base  # held, so that no other gets its id
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = decoder_of(model.train())(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
    del out
    return sum(tensor.numel() * tensor.itemsize for tensor in kept.values())


def adapter_parameters(architecture: Mapping[str, Any] | Any, rank: int, target: Sequence[str] = ()) -> int:
    """Return the parameters of a LoRA adapter: of every linear layer but the head, or of those that end in a target."""
    config = AutoConfig.for_model(**architecture) if isinstance(architecture, Mapping) else architecture
    with FakeTensorMode():
        model = _made(config, torch.float32)
    head = model.get_output_embeddings()
    adapted = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and (name.split(".")[-1] in target if target else layer is not head)
    ]
    return rank * sum(layer.in_features + layer.out_features for layer in adapted)


def optimizer_bytes(optim: str, weight_bytes: int) -> float | None:
    """Return the bytes that an optimizer of transformers keeps for a parameter; None where that is not known."""
    words = optim.split("_")
    halves = 0.5 if "lion" in optim else 1.5 if "ademamix" in optim else 1.0  # of Adam's two states
    for bits, size in _FIXED_STATES.items():
        if bits in words or optim.endswith(bits):
            return size * halves
    if words[0] == "paged" or "bnb" in words:
        return _FIXED_STATES["32bit"] * halves
    copies = _LIKE_THE_WEIGHT.get(words[0])
    return None if copies is None or "apex" in words or "anyprecision" in words else float(copies * weight_bytes)


@dataclass(frozen=True)
class RunShape:
    """What of a run decides about its memory.

    Attributes:
        dtype: of the weights.
        autocast: whether fp32 weights are computed with in half precision.
        trained: parameters that are; None is all.
        optim: transformers' name of the optimizer.
        reference: "live", "cached", "adapter" or None.
        reference_8bit: whether the reference is quantised.
        distributions: whether the loss compares whole distributions.
        token_budget: tokens of a micro-batch.
        chunk_rows: rows of logits alive at a time; None is the GPU's default.
        gpu_bytes: all memory of the GPU, on which that default depends; None is that of a small one.
        checkpointing: whether layers are computed again in the backward pass.
    """

    dtype: torch.dtype
    optim: str
    token_budget: int
    autocast: bool = False
    trained: int | None = None
    reference: str | None = None
    reference_8bit: bool = False
    distributions: bool = False
    chunk_rows: int | None = None
    gpu_bytes: int | None = None
    checkpointing: bool = False


def memory(model: ModelSizes, run: RunShape) -> dict[str, int | None]:
    """Return the bytes of each item of this module's table; None for what is not known."""
    weight, head = run.dtype.itemsize, model.vocabulary * model.hidden
    trained = model.parameters if run.trained is None else run.trained
    trained_bytes = weight if run.trained is None else 4  # peft keeps adapters in fp32
    states = optimizer_bytes(run.optim, trained_bytes)
    computing = 2 if run.autocast else weight
    logit = 4 if run.distributions else computing

    def logits(rows: int) -> int:
        own = rows * model.vocabulary * logit
        if run.distributions:
            return 2 * own
        in_turn = shares_workspace("cuda", 2 * own, logits_budget("cuda", run.gpu_bytes))
        return 2 * own if run.reference == "live" and not in_turn else own

    rows = min(_chunk_rows(model, run, logit, logits), run.token_budget)
    several = run.token_budget > rows
    reference = 0.0
    if run.reference == "live":
        reference = (model.parameters - head) * 1.0 + head * weight if run.reference_8bit else model.parameters * weight
    layers = model.layers * model.kept_by_layer
    if run.checkpointing:
        layers = model.layers * model.hidden * computing + model.kept_by_layer
    items: dict[str, float | None] = {
        "weights": model.parameters * weight,
        "autocast copies": 2 * model.parameters if run.autocast and weight > 2 else 0,
        "gradients": trained * trained_bytes,
        "optimizer states": None if states is None else trained * states,
        "reference model": reference,
        "logits": logits(rows),
        "head gradient": _head_gradient(head, computing, several=several, run=run),
        "activations": run.token_budget * (model.kept_once + layers),
    }
    return {name: None if size is None else round(size) for name, size in items.items()}


def _chunk_rows(model: ModelSizes, run: RunShape, logit: int, logits: Callable[[int], int]) -> int:
    """Return the rows of a chunk, all of them where bf16 gradients of a trained head make that no larger."""
    if run.chunk_rows is not None:
        return run.chunk_rows
    rows = default_chunk_rows("cuda", model.vocabulary, logit, total_bytes=run.gpu_bytes)
    halves = run.autocast or run.dtype == torch.bfloat16
    head = model.vocabulary, model.hidden
    if run.trained is None and halves and one_chunk_is_smaller(run.token_budget, rows, head, logits):
        return run.token_budget
    return rows


def _head_gradient(head: int, computing: int, *, several: bool, run: RunShape) -> int:
    copies = 8 if run.distributions and computing < 4 else 0  # both heads in fp32
    if run.trained is not None:  # LoRA: the head is frozen
        return head * copies
    return head * (copies + computing + (4 if several and computing < 4 else 0))


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that a run writes.

    Attributes:
        model: of the model at the end.
        checkpoint: of one checkpoint.
        checkpoints: how many of them are there at a time, at most: a new one is whole before an old one goes.
    """

    model: int
    checkpoint: int
    checkpoints: int

    def total(self, there: int = 0) -> int:
        """Return what is still to be written where so many checkpoints are there already."""
        return self.model + max(0, self.checkpoints - there) * self.checkpoint


def disk_need(model: Any, args: Any, steps: int, epoch_steps: int, *, merged: bool = False) -> DiskNeed:
    """Return what a run writes: weights, and in a checkpoint what its optimizer keeps of those that are trained.

    Args:
        model: a model, or a ``peft.PeftModel``, of which the adapter alone is written.
        args: ``transformers.TrainingArguments``.
        steps: optimizer steps of the run.
        epoch_steps: those of an epoch.
        merged: whether the model that is written at the end has its adapter in it.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    whole, adapter = (
        sum(weight.numel() * weight.itemsize for weight in some) for some in (model.parameters(), trained)
    )
    saved = whole if base_of(model) is model else adapter
    states = 0.0
    if not args.save_only_model:
        optim = str(getattr(args.optim, "value", args.optim))
        for weight in trained:
            known = optimizer_bytes(optim, weight.itemsize)
            states += weight.numel() * (_FIXED_STATES["32bit"] if known is None else known)
    return DiskNeed(whole if merged else saved, round(saved + states), _checkpoints(args, steps, epoch_steps))


def _checkpoints(args: Any, steps: int, epoch_steps: int) -> int:
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    every: float = epoch_steps
    if strategy == "steps":
        every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(steps * args.save_steps))
    count = math.ceil(steps / every)  # the last step writes one, too
    limit = 1 if strategy == "best" and not args.save_total_limit else args.save_total_limit
    return min(count, limit + 1) if limit else count


def training_flops(model: ModelSizes, tokens: int, *, checkpointing: bool = False) -> int:
    """Return 6 P tokens, 8 P with gradient checkpointing; P without embeddings."""
    return (8 if checkpointing else 6) * model.computing * tokens


def total(items: Mapping[str, int | None]) -> int:
    """Return the sum of what is known."""
    return sum(size for size in items.values() if size is not None)
