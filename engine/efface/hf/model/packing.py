"""Selection of how a model reads packed batches, by comparing a tiny packed batch with a pass of a single sequence.

A packed batch is read in one pass with packed attention (``efface.hf.model.attention``). If that is wrong for the
model, it is read in one pass with the model's own attention, which finds the start of each sequence in
``position_ids``. If a sequence then still gets other logits than in a pass of its own, or the model cannot read packed
batches at all, every sequence is run in a separate pass. The results are then those of separate passes, and so is the
cost. A packed batch is also split into separate passes if one of its sequences is so long that it changes the position
encoding of the others (dynamic NTK, LongRoPE).
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel

from efface.batching import PackedBatch, TokenStore, pack_store
from efface.hf.model.attention import NAME, hands_packs_on, hands_windows_on, packed_arguments
from efface.hf.model.forwards import ROUTED, found_forward, unwrapped_forward
from efface.hf.model.supported import check_placed, uncompiled, uncompiled_frame

MEMORY = "_efface_reading"  # attribute of a model with its PackReading; on the model, so that copies have it too

HALVES = (torch.float16, torch.bfloat16)

WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size", "index_topk")
"""Names of the attention window size in configurations and attention layers."""

ATTENTION_ONLY = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
"""Layer types, as configurations name them, that only attend to tokens of their own sequence."""

_OTHERS, _PROBE, _WINDOW = (7, 5), 8, 3  # tokens of the sequence before each probe, of a probe, and of a window
_FAR = 2**17  # assumed maximum length if the configuration names none

Logits = Callable[[Tensor], Tensor]
"""Maps hidden states (T, D) to logits (T, V)."""


@dataclass(frozen=True)
class PackReading:
    """The result of ``read_packs``: how a model reads packed batches.

    Attributes:
        attention: attention implementation for packed batches.
        own: attention implementation that the model had when ``read_packs`` measured it.
        alone: reason why every sequence is run in a separate pass; None if a packed batch is run in one pass.
        limit: length of a sequence from which on the sequences of its batch are run in separate passes; None if there
            is no such length.
        encodings: names of the modules whose position encoding depends on the longest sequence.
        asked: whether the caller chose the attention implementation.
        room: number of tokens of a batch above which its sequences are run in separate passes, because the mask of the
            model's own attention has that size; None if there is no such number.
        shares: whether sequences of a packed batch can share tokens.
    """

    attention: str
    own: str
    alone: str | None = None
    limit: int | None = None
    encodings: tuple[str, ...] = ()
    asked: bool = False
    room: int | None = None
    shares: bool = False

    def splits(self, longest: int, tokens: int = 0) -> bool:
        """Return whether a batch with ``tokens`` tokens and a longest sequence of ``longest`` needs separate passes."""
        if self.room is not None and tokens > self.room:
            return True
        return self.alone is not None or (self.limit is not None and longest >= self.limit)


def reading_of(model: Any) -> PackReading | None:
    """Return the result of ``read_packs`` for ``model`` (without wrappers) or the model it was copied from, or None."""
    reading: PackReading | None = vars(model).get(MEMORY)
    return reading


def shares_tokens(model: PreTrainedModel, longest: int) -> bool:
    """Return whether ``model`` can read batches in which sequences of up to ``longest`` tokens share tokens."""
    return why_unshared(model, longest) is None


def why_unshared(model: PreTrainedModel, longest: int) -> str | None:
    """Return why ``model`` cannot read batches whose sequences of up to ``longest`` tokens share tokens, or None."""
    reading, attention = reading_of(model), model.config._attn_implementation  # noqa: SLF001
    if reading is not None and reading.alone is not None:
        return "it runs one sequence per pass"
    if attention != NAME:
        return f"its attention is {attention!r}, not {NAME!r}"
    if reading is None:
        return None
    if reading.splits(longest):
        return f"sequences of {reading.limit} tokens and more change its position encoding"
    return None if reading.shares else "with shared tokens a small batch gave other logits"


def readable(model: PreTrainedModel, batch: PackedBatch) -> PackedBatch:
    """Return ``batch`` as ``model`` can read it: without shared tokens, if the model does not support them.

    The label rows stay in the same order.
    """
    if batch.last_tokens and not batch.shared:
        return batch
    reading, longest = reading_of(model), max(batch.lengths)
    if reading is not None and reading.splits(longest, batch.tokens):
        return batch.unshared()  # with last tokens, because the position encoding can depend on a sequence's length
    return batch.unshared() if batch.shared and not shares_tokens(model, longest) else batch


def decoder_of(model: PreTrainedModel) -> Any:
    """Return the part of the model that computes the final hidden states."""
    decoder = model.get_decoder()  # transformers 4.56.0 returns None for most models
    if decoder not in (None, model) and not isinstance(decoder, nn.Linear):  # in ModernBERT, `decoder` is the head
        return decoder
    if model.base_model is not model:  # transformers 4: get_decoder returns the model itself, for example for GPT-NeoX
        return model.base_model
    inner = (child for child in model.children() if isinstance(child, PreTrainedModel))
    return next(inner, model)  # Llama-4's base_model_prefix names an attribute that it does not have


@uncompiled_frame
def packed_states(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Return the final hidden states (T, D) of all stored tokens of a batch that is ``readable`` for the model.

    Raises:
        ValueError: if the batch has shared tokens and the model does not support them.
    """
    reading, decoder = reading_of(model), decoder_of(model)
    if reading is None or not reading.splits(max(batch.lengths), batch.tokens):
        states: Tensor = decoder(**packed_arguments(model, batch, decoder)).last_hidden_state  # (1, T, D)
        return states[0]
    if batch.shared:
        raise ValueError(
            f"`batch`: expected one without shared tokens, got one with; {type(model).__name__} runs one sequence per "
            "pass; use batch.unshared()"
        )
    parts = []
    for ids in batch.input_ids.split(batch.segment_lengths):
        rewind(model, reading.encodings)
        parts.append(_alone(decoder, ids))
    return torch.cat(parts)


def _alone(decoder: Any, ids: Tensor) -> Tensor:
    """Return the hidden states (n, D) of one sequence (n,)."""
    states: Tensor = decoder(input_ids=ids[None], **_uncached(decoder)).last_hidden_state
    return states[0]


def _uncached(model: Any) -> dict[str, bool]:
    """Return ``use_cache=False`` as keyword arguments if the model takes it; GPT-1 in transformers 4 does not."""
    return {"use_cache": False} if _takes(type(model).forward, "use_cache") else {}


@cache
def _takes(forward: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(forward).parameters.values()
    return any(parameter.name == name or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


@uncompiled
def rewind(model: PreTrainedModel, encodings: Sequence[str]) -> None:
    """Reset position encodings after a long sequence; transformers' dynamic NTK remembers the longest one."""
    for name in encodings:
        module = model.get_submodule(name)
        device = next((buffer.device for buffer in module.buffers()), model.device)
        _encode(module, torch.zeros(1, 1, dtype=torch.int64, device=device))


def read_packs(model: PreTrainedModel, logits: Logits, attention: str | None = None) -> PackReading:
    """Measure how ``model`` reads packed batches, store the result on the model, and set its attention accordingly.

    The model's own forward pass of a probe sequence is compared with a packed batch that contains the probe twice, each
    time after another sequence. If all logits agree, no further passes are needed. During the measurement, attention
    windows are a few tokens long, so that a few tokens show whether the windows are respected. Modes, buffers,
    attributes and random-number generators are restored afterwards.

    Args:
        model: a transformers model without wrappers.
        logits: function that computes the head's logits as the loss op does.
        attention: attention implementation to use; None uses packed attention if it gives the right logits, otherwise
            the model's own.

    Raises:
        ValueError: if the model's logits are not those of its head on the last hidden states, or the model is not
            causal, that is, its tokens see later tokens.
    """
    known, own = reading_of(model), model.config._attn_implementation  # noqa: SLF001
    check_placed(model)
    # Measure again if a forward has been set on the instance since, because it can change the logits.
    if (
        known is None
        or not _still_applies(known, own, attention)
        or (found_forward(model) and not hasattr(model, ROUTED))
    ):
        encodings, limit = position_encodings(model)
        ways = [attention] if attention is not None else [NAME, own]
        known = PackReading("", own, None, limit, encodings, asked=attention is not None)
        if (found := _measured(model, logits, list(dict.fromkeys(ways)), known)) is None:
            found = _expected(model, attention, known)
        known = found
        if known.alone is not None:
            warnings.warn(
                f"{type(model).__name__}: runs one sequence per pass, which is slower than packed batches and gives "
                f"the results of separate passes: {known.alone}",
                stacklevel=3,
            )
        setattr(model, MEMORY, known)
    if model.config._attn_implementation != known.attention:  # noqa: SLF001
        model.set_attn_implementation(known.attention)
    return known


def _still_applies(known: PackReading, now: str, attention: str | None) -> bool:
    """Return whether an earlier result still applies for the current attention and the requested one."""
    if attention is not None:
        return known.attention == attention
    return known.attention == NAME or now in {known.own, known.attention}


def agree(model: PreTrainedModel) -> None:
    """Make all processes read packed batches as the most cautious one does; some may have no weights to measure."""
    readings = [reading for reading in gather_object([reading_of(model)]) if reading is not None]
    cautious = [reading for reading in readings if reading.alone] + [r for r in readings if r.attention != NAME]
    cautious += [reading for reading in readings if not reading.shares]
    if cautious and cautious[0] != reading_of(model):
        setattr(model, MEMORY, cautious[0])
        model.set_attn_implementation(cautious[0].attention)


# ---- measuring ----


def _measured(model: PreTrainedModel, logits: Logits, ways: Sequence[str], reading: PackReading) -> PackReading | None:
    """Return ``reading`` with the measured values, or None if weights are missing or the logits are not finite."""
    if any(weight.numel() == 0 or weight.is_meta for weight in model.parameters()):
        return None  # sharded or not yet loaded
    with as_it_was(model), _precision(model):
        _shorten_windows(model)
        ids = distinct_tokens(model)
        probe = ids[None, :_PROBE]
        expected = _own_logits(model, probe)
        if not expected.isfinite().all():
            return None
        reasons = []
        if unseen := sorted(_layer_kinds(model) - ATTENTION_ONLY):
            ways, reasons = (), [f"a few tokens do not show how its layers behave ({', '.join(unseen)})"]
        for way in ways:
            try:
                got = _probes_in_a_pack(model, ids, way)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - a model's code can raise anything for unknown arguments
                reasons.append(f"with {way!r} attention a packed batch raises {type(error).__name__} ({_short(error)})")
                continue
            _check_width(model, got)
            first, second = logits(got).split(_PROBE)
            if equal_logits(model, first, expected) and equal_logits(model, second, first, alike=True):
                if way != NAME:
                    return replace(reading, attention=way, room=_mask_size(model))
                shares = equal_logits(model, logits(_probe_in_a_tree(model, ids)), expected)
                return replace(reading, attention=way, shares=shares)
            reasons.append(f"with {way!r} attention the sequences of a packed batch change each other's logits")
        _attend(model, reading.own)
        decoder = decoder_of(model)
        states = _alone(decoder, ids[:_PROBE])
        _check_width(model, states)
        _check_head(model, logits(states), expected)
        states = _alone(decoder, ids[: _PROBE + 1])[:_PROBE]
        if not equal_logits(model, logits(states), expected):
            raise ValueError(
                f"{type(model).__name__}: expected a causal language model, got one whose logits at a token depend on "
                "later tokens (or change from pass to pass); set is_decoder=True if its configuration has that setting"
            )
        return replace(reading, attention=reading.own, alone="; ".join(reasons))


def _precision(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Return autocast if head and decoder have different dtypes and the model only runs under autocast."""
    head: Any = model.get_output_embeddings()
    dtype, device = next(decoder_of(model).parameters()).dtype, model.device.type
    if dtype == getattr(head, "weight", torch.empty(0, dtype=dtype)).dtype or torch.is_autocast_enabled(device):
        return nullcontext()
    with suppress(RuntimeError):
        model(input_ids=distinct_tokens(model)[None, :_PROBE], **_uncached(model))
        return nullcontext()
    half = dtype if dtype in HALVES else torch.bfloat16
    return torch.autocast(device, half)


def _mask_size(model: PreTrainedModel) -> int | None:
    """Return the size of the smallest square buffer, which can be an attention mask as in GPT-Neo, or None."""
    shapes = [buffer.shape[-2:] for buffer in model.buffers() if buffer.dim() > 1]
    return min((rows for rows, columns in shapes if rows == columns > 1), default=None)


def _own_logits(model: PreTrainedModel, probe: Tensor) -> Tensor:
    """Return the logits (8, V) of the model's own forward pass, in fp32."""
    try:
        # Without a trainer's mixed-precision wrapper, so in the precision of the weights.
        logits: Tensor = (unwrapped_forward(model) or model)(input_ids=probe, **_uncached(model)).logits
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__}: expected a model that reads {probe.shape[1]} tokens (input_ids alone), got "
            f"{type(error).__name__}: {_short(error)}"
        ) from error
    return logits[0].float()


def _probes_in_a_pack(model: PreTrainedModel, ids: Tensor, way: str) -> Tensor:
    """Return the hidden states (16, D) of two probes in a packed batch.

    Each probe follows another sequence, and is one token longer than the probe that runs alone.
    """
    _attend(model, way)
    probe = ids[: _PROBE + 1]
    sequences = [part for other in ids[_PROBE + 1 :].split(_OTHERS) for part in (other, probe)]
    lengths = tuple(len(sequence) for sequence in sequences)
    batch = PackedBatch.of(
        input_ids=torch.cat(sequences),
        position_ids=torch.cat([torch.arange(n, device=ids.device) for n in lengths]),
        label_rows=ids[:0],
        targets=ids[:0],
        sequences=torch.arange(len(lengths), device=ids.device),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=ids.device),
        roles=torch.zeros(len(lengths), dtype=torch.int8, device=ids.device),
        lengths=lengths,
        row_offsets=(0,) * (len(lengths) + 1),
    )
    decoder = decoder_of(model)
    states: Tensor = decoder(**packed_arguments(model, batch, decoder)).last_hidden_state[0]
    return torch.cat([part[:_PROBE] for part in states.split(lengths)[1::2]])


def _probe_in_a_tree(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the hidden states (8, D) of a probe that shares tokens with the sequences before and after it."""
    probe, others = ids[: _PROBE + 1].tolist(), ids[_PROBE + 1 :].tolist()
    sequences = [probe[:4] + others[:5], probe, probe[:6] + others[5:]]
    batch = pack_store(TokenStore.from_sequences(sequences, [1] * 3), np.arange(3), share=True).to(model.device)
    decoder = decoder_of(model)
    states: Tensor = decoder(**packed_arguments(model, batch, decoder)).last_hidden_state[0]
    return states[batch.paths[batch.path_lengths[0] :][:_PROBE]]


def _attend(model: PreTrainedModel, way: str) -> None:
    if model.config._attn_implementation == way:  # noqa: SLF001
        return
    model.set_attn_implementation(way)
    if model.config._attn_implementation != way:  # noqa: SLF001 - transformers only warns if it cannot switch
        raise ValueError("its attention cannot be replaced")


def distinct_tokens(model: PreTrainedModel) -> Tensor:
    """Return distinct token ids for the probe and the other sequences, without the first ids (often special tokens)."""
    embeddings: Any = model.get_input_embeddings()
    ids: Tensor = (10 + 3 * torch.arange(_PROBE + 1 + sum(_OTHERS))) % embeddings.weight.shape[0]
    return ids.to(model.device)


def _errors(got: Tensor, expected: Tensor) -> Tensor:
    """Return each token's rms difference of logits, relative to the logits' spread plus 5 % of their rms size."""
    varying = (expected - expected.mean(1, keepdim=True)).square().mean().sqrt()
    size = expected.square().mean().sqrt()  # rounding errors are relative to the size, even if all logits are similar
    return (got.float() - expected).square().mean(1).sqrt() / (varying + 0.05 * size + 1e-6)


def equal_logits(model: PreTrainedModel, got: Tensor, expected: Tensor, *, alike: bool = False) -> bool:
    """Return whether logits (n, V) differ only by rounding.

    Args:
        model: the model, whose dtype decides the tolerance.
        got: (n, V) logits.
        expected: (n, V) float32 logits.
        alike: whether both were computed by the same kernels in one pass, so that the tolerance is smaller.
    """
    errors = _errors(got, expected)
    if not _rough(model):
        return bool(errors.max() <= 2e-4)
    # Rounding can route a token to other experts, so single tokens can differ a lot. A real error affects most tokens,
    # so the median has the tight tolerance.
    return bool(errors.median() <= (0.004 if alike else 0.1) and errors.max() <= 0.5)


def _rough(model: PreTrainedModel) -> bool:
    """Return whether matrix products have less precision than fp32."""
    device = model.device.type
    tf32 = device == "cuda" and torch.backends.cuda.matmul.allow_tf32
    kinds = {weight.dtype for weight in model.parameters()}
    return tf32 or torch.is_autocast_enabled(device) or not kinds <= {torch.float32, torch.float64}


def _check_width(model: PreTrainedModel, states: Tensor) -> None:
    head, width = model.get_output_embeddings(), states.shape[-1]
    features = getattr(head, "in_features", width)
    if features != width:
        raise ValueError(
            f"{type(model).__name__}: expected a head for the {width} features of its last hidden states, got a head "
            f"for {features}; efface does not support the layers between them"
        )


def _check_head(model: PreTrainedModel, got: Tensor, expected: Tensor) -> None:
    """Raise ValueError if the model's logits are not those that its head computes."""
    if equal_logits(model, got, expected):
        return
    worst, size = (got.float() - expected).abs().max().item(), expected.abs().max().item()
    raise ValueError(
        f"{type(model).__name__}: its logits are not those of its head on its last hidden states (they differ by "
        f"{worst:.3g}, the largest is {size:.3g}), so the loss op would train another model; its config may scale "
        "or shift logits in a way that efface does not support"
    )


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else f"{text[:117]}..."


# ---- restoring the model ----


@contextmanager
def as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Run the block in evaluation mode without gradients, and restore the model's state afterwards, bit for bit.

    The state consists of the attributes and buffers of all modules, the attributes of the configurations, the attention
    implementation and the random-number generators.
    """
    attention = model.config._attn_implementation  # noqa: SLF001
    modules = [(module, _plain_attributes(module), _copied_buffers(module)) for module in model.modules()]
    configs = [(config, dict(vars(config))) for config in _configs(model)]
    cards = sorted({weight.get_device() for weight in model.parameters() if weight.is_cuda})
    try:
        with torch.random.fork_rng(cards), torch.no_grad():
            model.eval()
            yield
    finally:
        _attend(model, attention)
        for config, settings in configs:
            vars(config).clear()
            vars(config).update(settings)
        for module, attributes, buffers in modules:
            for name in _plain_attributes(module).keys() - attributes.keys():
                delattr(module, name)
            vars(module).update(attributes)
            module._buffers.clear()  # noqa: SLF001 - a buffer may have been replaced by another tensor
            for name, (buffer, before) in buffers.items():
                module._buffers[name] = buffer  # noqa: SLF001
                if buffer is not None and before is not None and not buffer.is_meta:
                    buffer.copy_(before)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module without its parameters, buffers, submodules and hooks."""
    registers = ("_parameters", "_buffers", "_modules")
    return {name: value for name, value in vars(module).items() if name not in registers and "hooks" not in name}


def _copied_buffers(module: nn.Module) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    return {name: (b, None if b is None else b.clone()) for name, b in module._buffers.items()}  # noqa: SLF001


def _configs(model: PreTrainedModel) -> list[Any]:
    found = [model.config, model.config.get_text_config()]
    found += [vars(module)["config"] for module in model.modules() if hasattr(vars(module).get("config"), "to_dict")]
    return list({id(config): config for config in found}.values())


def _shorten_windows(model: PreTrainedModel) -> None:
    """Set every attention window to three tokens, in the configurations, from which masks are made, and in the layers.

    A layer's window attribute can be the configuration's value or one more.
    """
    shortened: dict[str, dict[int, int]] = {}
    for config in _configs(model):
        for name in WINDOWS:
            size = vars(config).get(name)
            if isinstance(size, int) and not isinstance(size, bool) and size > _WINDOW:
                setattr(config, name, _WINDOW)
                for more in (0, 1):
                    shortened.setdefault(name, {})[size + more] = _WINDOW + more
    for module in model.modules():
        for name in WINDOWS:
            size = vars(module).get(name)
            for sizes in shortened.values():
                if isinstance(size, int) and size in sizes:
                    setattr(module, name, sizes[size])
                    break


# ---- position encodings ----


def position_encodings(model: PreTrainedModel) -> tuple[tuple[str, ...], int | None]:
    """Return the modules whose position encoding depends on the longest position, and the length from which it does.

    Copies of the modules are called on the CPU in fp32, with a few positions, and with the same positions and a far
    one.
    """
    names, limits = [], []
    for name, module in model.named_modules():
        if not _encodes_positions(type(module).forward) or next(module.parameters(), None) is not None:
            continue
        twin = None
        with suppress(NotImplementedError):  # buffers on the meta device
            twin = copy.deepcopy(module).to("cpu").float()
        limit = None if twin is None else _changing_length(twin, _far(model))
        if limit is not None:
            names.append(name)
            limits.append(limit)
    return tuple(names), min(limits, default=None)


@cache
def _encodes_positions(forward: Callable[..., Any]) -> bool:
    return "position_ids" in inspect.signature(forward).parameters


def _far(model: PreTrainedModel) -> int:
    """Return a number of tokens greater than every length in the configuration."""
    settings = vars(model.config.get_text_config())
    nested = [value for value in settings.values() if isinstance(value, dict)]
    named = [item for part in (settings, *nested) for item in part.items()]
    lengths = [value for name, value in named if "position" in str(name) and isinstance(value, int)]
    return 2 * max(lengths, default=_FAR) + _PROBE


def _changing_length(module: nn.Module, far: int) -> int | None:
    """Return the sequence length from which on a sequence can change other sequences' encoding, or None.

    It is one less than the first length that changes an encoding. At that length, transformers' dynamic NTK does not
    reset the encoding after a longer sequence, so the sequence can itself be affected.
    """
    same = _encoding_up_to(module, _PROBE + 1)
    if same is None or _encoding_up_to(module, far) in (None, same):
        return None
    low, high = _PROBE + 1, far  # not changed at low, changed at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _encoding_up_to(module, middle) == same else (low, middle)
    return low


def _encoding_up_to(module: nn.Module, length: int) -> list[bytes] | None:
    """Return the encoding of the first positions in a call that includes position ``length`` − 1; None if it fails."""
    positions = torch.cat([torch.arange(_PROBE), torch.tensor([length - 1])])[None]
    try:
        _encode(module, positions[:, :1])
        encoded = _encode(module, positions)
    except Exception:  # noqa: BLE001 - a table that is too short, unknown arguments: there is nothing to compare
        return None
    rows = [tensor.movedim(tensor.shape.index(_PROBE + 1), 0)[:_PROBE] for tensor in encoded]
    return [bytes(torch.view_as_real(r).numpy() if r.is_complex() else r.contiguous().numpy()) for r in rows]


@torch.no_grad()
def _encode(module: nn.Module, positions: Tensor) -> list[Tensor]:
    """Call a position encoding for positions (1, n), once for each layer type that it distinguishes."""
    parameters = inspect.signature(type(module).forward).parameters
    states = torch.zeros(1, positions.shape[1], 1, device=positions.device)
    kinds = dict.fromkeys(getattr(module, "layer_types", None) or [None]) if "layer_type" in parameters else [None]
    encoded: list[Tensor] = []
    for kind in kinds:
        options = {} if kind is None else {"layer_type": kind}
        if next(name for name in parameters if name != "self") != "position_ids":
            out = module(states, position_ids=positions, **options)
        else:
            out = module(positions, **options)
        encoded += [tensor for tensor in (out if isinstance(out, tuple) else (out,)) if isinstance(tensor, Tensor)]
    return encoded


# ---- models without weights in this process ----


def _expected(model: PreTrainedModel, attention: str | None, reading: PackReading) -> PackReading:
    """Return how a model without weights here (sharded, on the meta device) reads packs, from its configuration."""
    kinds = _layer_kinds(model)
    stateful = getattr(model, "_is_stateful", False) and not kinds
    known = getattr(model, "_supports_attention_backend", False) and kinds <= ATTENTION_ONLY - {"chunked_attention"}
    if stateful or not known or not hands_packs_on(model):
        reason = "its weights are not in this process to be measured, and its layers may not be attention only"
        return replace(reading, attention=attention or reading.own, alone=reason)
    way = attention or (NAME if hands_windows_on(model) else reading.own)
    return replace(reading, attention=way, shares=way == NAME)


def _layer_kinds(model: PreTrainedModel) -> set[str]:
    """Return the layer types that the configuration lists."""
    config = model.config.get_text_config()
    lists = (getattr(config, name, None) for name in ("layer_types", "layers_block_type", "block_types"))
    return {kind for kinds in lists if isinstance(kinds, (list, tuple)) for kind in kinds}
