"""Estimates of the memory, disk space and FLOPs of a run, from the configuration; no weights are loaded or measured.

The memory table gives bytes on the device of one process, without sharding. P: parameters, P_t: trained parameters,
b: bytes per weight, V: vocabulary, D: hidden size, T: tokens of a micro-batch (``token_budget``), n: rows of logits in
memory at a time.

    weights            P b
    autocast copies    2 P, for fp32 weights in mixed precision
    gradients          P_t b
    optimizer states   P_t x bytes of optimizer state per parameter
    reference model    live: P b; cached, adapter: 0
    logits             n V b; twice with a live reference, or once if two exceed the device's logits budget, because
                       they then take turns in one buffer; with a distribution (KL, UNDIAL) twice in fp32
    head gradient      V D b, + 4 V D for its fp32 sum over several chunks; with a distribution + 8 V D for fp32 heads
    activations        T (once + layers x by layer); with gradient checkpointing T (once + layers x D b + by layer)

The tensors that a layer keeps for its backward pass are counted one by one on torch's fake tensors, which have shapes
but no data, with an attention that stores no scores (like FlashAttention). Allocator blocks, library workspaces and the
small tensors of the loss are not included.
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

# State of transformers' optimizers per trained parameter: in bytes, or as a number of tensors like the weight.
_FIXED_STATES = {"32bit": 8.0, "8bit": 2.0, "4bit": 1.0}
_LIKE_THE_WEIGHT = {"adamw": 2, "nadamw": 2, "sgd": 0, "adagrad": 1, "rmsprop": 1, "lion": 1, "ademamix": 3}


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model from which memory and FLOPs are estimated.

    Attributes:
        parameters: number of all parameters; tied ones count once.
        computing: number of parameters without embeddings, as the trainer counts them for FLOPs.
        layers: number of decoder layers.
        hidden: hidden size D.
        vocabulary: vocabulary size V.
        kept_once: bytes per token kept for the backward pass outside the layers.
        kept_by_layer: bytes per token kept for the backward pass by one layer.
    """

    parameters: int
    computing: int
    layers: int
    hidden: int
    vocabulary: int
    kept_once: float
    kept_by_layer: float


def model_sizes(architecture: Mapping[str, Any] | Any, dtype: torch.dtype, *, autocast: bool = False) -> ModelSizes:
    """Return the sizes of a model configuration.

    Args:
        architecture: a configuration of transformers, or a mapping of its fields.
        dtype: dtype of the weights.
        autocast: whether the model computes in bf16 under autocast.

    Raises:
        ValueError: transformers does not know the model type.
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
    """Stand-in for attention with the output shape and saved tensors of FlashAttention: q, k, v, output, row sums."""

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
    """Return the bytes per token that a model of fake tensors keeps for the backward pass, without the head.

    The value is the difference between two sequence lengths per token, because weights and their autocast copies are
    kept too and do not depend on the number of tokens.
    """
    few, more = (_kept_of(model, tokens, autocast=autocast) for tokens in (_TOKENS, 2 * _TOKENS))
    return (more - few) / _TOKENS


def _kept_of(model: Any, tokens: int, *, autocast: bool) -> int:
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._base is not None else tensor  # noqa: SLF001 - views share their memory
        kept[id(base)] = base  # keep a reference, so that no other tensor gets its id
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = decoder_of(model.train())(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
    del out
    return sum(tensor.numel() * tensor.itemsize for tensor in kept.values())


def adapter_parameters(architecture: Mapping[str, Any] | Any, rank: int, target: Sequence[str] = ()) -> int:
    """Return the number of parameters of a LoRA adapter.

    Args:
        architecture: a configuration of transformers, or a mapping of its fields.
        rank: rank of the adapter.
        target: last parts of the names of the adapted linear layers; empty adapts all linear layers except the head.
    """
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
    """Return the bytes of state per parameter of an optimizer of transformers; None if unknown."""
    words = optim.split("_")
    halves = 0.5 if "lion" in optim else 1.5 if "ademamix" in optim else 1.0  # relative to the two states of Adam
    for bits, size in _FIXED_STATES.items():
        if bits in words or optim.endswith(bits):
            return size * halves
    if words[0] == "paged" or "bnb" in words:
        return _FIXED_STATES["32bit"] * halves
    copies = _LIKE_THE_WEIGHT.get(words[0])
    return None if copies is None or "apex" in words or "anyprecision" in words else float(copies * weight_bytes)


@dataclass(frozen=True)
class RunShape:
    """Settings of a run that determine its memory.

    Attributes:
        dtype: dtype of the weights.
        autocast: whether the model computes in half precision under autocast.
        trained: number of trained parameters; None is all.
        optim: name of the optimizer in transformers.
        reference: "live", "cached", "adapter" or None.
        reference_8bit: whether the reference model is quantised to 8 bits.
        distributions: whether the loss compares full distributions (KL, UNDIAL).
        token_budget: maximum tokens of a micro-batch.
        chunk_rows: rows of logits in memory at a time; None is the default for the GPU.
        gpu_bytes: total memory of the GPU, on which that default depends; None assumes a small GPU.
        checkpointing: whether the backward pass recomputes layers (gradient checkpointing).
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
    """Return the bytes of each item of this module's table; None for an unknown item."""
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
    """Return the rows per chunk of logits.

    This is ``token_budget``, one chunk, if the head is trained with bf16 gradients and one chunk needs no more memory.
    """
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
    """Bytes that a run writes to disk.

    Attributes:
        model: bytes of the final model.
        checkpoint: bytes of one checkpoint.
        checkpoints: maximum number of checkpoints at a time; a new one is complete before an old one is removed.
    """

    model: int
    checkpoint: int
    checkpoints: int

    def total(self, there: int = 0) -> int:
        """Return the bytes that remain to be written if ``there`` checkpoints already exist."""
        return self.model + max(0, self.checkpoints - there) * self.checkpoint


def disk_need(model: Any, args: Any, steps: int, epoch_steps: int, *, merged: bool = False) -> DiskNeed:
    """Return the disk space of a run: the final model, and checkpoints with weights and optimizer states.

    Args:
        model: a model; or a ``peft.PeftModel``, of which only the adapter is written.
        args: ``transformers.TrainingArguments``.
        steps: optimizer steps of the run.
        epoch_steps: optimizer steps of an epoch.
        merged: whether the final model is written with the adapter merged into it.
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
    count = math.ceil(steps / every)  # the last step writes one too
    limit = 1 if strategy == "best" and not args.save_total_limit else args.save_total_limit
    return min(count, limit + 1) if limit else count


def training_flops(model: ModelSizes, tokens: int, *, checkpointing: bool = False) -> int:
    """Return 6 P tokens, or 8 P tokens with gradient checkpointing; P counts the parameters without embeddings."""
    return (8 if checkpointing else 6) * model.computing * tokens


def total(items: Mapping[str, int | None]) -> int:
    """Return the sum of the known items."""
    return sum(size for size in items.values() if size is not None)
