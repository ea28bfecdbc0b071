"""The decode loop: a batch of prompts continued token by token, rows leaving as they end.

Tokens are the most probable ones, or drawn so that a row's draws depend on nothing but the row and the seed. Whether a
model can continue prompts of several lengths in one batch, padded on the left, is measured once.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from efface.hf.model.packing import as_it_was, distinct_tokens, equal_logits, position_encodings, rewind

_MEMORY = "_efface_padding"
_PADDING, _PROMPT = 5, 8  # tokens


@dataclass(frozen=True)
class Padding:
    """What a model makes of padding on the left.

    Attributes:
        exact: whether the logits behind it are those of the prompt alone.
        limit: tokens of a sequence from which on it may change the position encoding of those beside it, or None.
        encodings: names of the modules that encode them.
    """

    exact: bool
    limit: int | None
    encodings: tuple[str, ...]

    def keeps_apart(self, lengths: Sequence[int], longest: int) -> bool:
        """Whether prompts of these lengths, up to ``longest`` tokens with their answers, are to run one by one."""
        return (not self.exact and len(set(lengths)) > 1) or (self.limit is not None and longest >= self.limit)


def padding_of(model: PreTrainedModel) -> Padding:
    """Return what ``model`` makes of padding on the left; its copies know it, too. Two tiny passes, the first time."""
    known: Padding | None = vars(model).get(_MEMORY)
    if known is None:
        encodings, limit = position_encodings(model)
        known = Padding(_exact(model), limit, encodings)
        setattr(model, _MEMORY, known)
    return known


def accepted(model: Any) -> set[str]:
    """Return the arguments of the model's own forward; a fused model has it one class further up."""
    forwards = (_parameters(vars(owner)["forward"]) for owner in type(model).__mro__ if "forward" in vars(owner))
    return next((names for names in forwards if "input_ids" in names), set())


def _exact(model: PreTrainedModel) -> bool:
    with as_it_was(model):
        ids = distinct_tokens(model)[None, : _PADDING + _PROMPT]
        alone = _last_logits(model, {"input_ids": ids[:, _PADDING:]})
        mask = torch.ones_like(ids)
        mask[:, :_PADDING] = 0
        behind = {
            "input_ids": ids * mask,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }
        reads = accepted(model)
        padded = _last_logits(model, {name: value for name, value in behind.items() if name in reads})
        return not alone.isfinite().all() or equal_logits(model, padded, alone)


def _last_logits(model: Any, arguments: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(use_cache=False, **arguments).logits
    return logits[:, -1].float()


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


Pick = Callable[[Tensor, Tensor, int], Tensor]
"""Takes the logits (b, V), the answers that they are of (b,) and the number of the token; returns tokens (b,)."""


def greedy(logits: Tensor, rows: Tensor, step: int) -> Tensor:  # noqa: ARG001 - a ``Pick``
    """Return the most probable token of each row."""
    return logits.argmax(-1)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        n: answers of each prompt.
        temperature: what logits are divided by.
        top_p: draw from the most probable tokens that together have this probability (Holtzman et al. 2020,
            1904.09751, section 3.1); 1 is all.
        seed: another seed, other answers.

    Raises:
        ValueError: no answer, a temperature that is not positive, a share outside 0 .. 1.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"`n`: expected at least 1 answer, got {self.n}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"`temperature`: expected a positive number, got {self.temperature}; for greedy answers leave out "
                "`sampling`"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p`: expected more than 0, at most 1, got {self.top_p}")


def uniforms(sampling: Sampling, row: bytes, tokens: int) -> NDArray[np.float64]:
    """Return (n, tokens) numbers in [0, 1), one for every token of every answer to a row of this content.

    They are all the chance there is: no generator is shared, so neither batches nor processes change an answer, and
    the first answers of more are the answers of fewer.
    """
    words = [hashlib.sha256(f"{sampling.seed}/{number}/".encode() + row).digest()[:16] for number in range(sampling.n)]
    return np.stack([np.random.default_rng(int.from_bytes(word, "little")).random(tokens) for word in words])


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Return the token (B,) at which the cumulative probability of the most probable passes ``uniform`` (B,).

    Args:
        logits: (B, V).
        uniform: (B,) float64, in [0, 1): a share of the probability that ``top_p`` leaves.
        sampling: temperature and top_p.
    """
    # float32 would lose what a vocabulary of 128k sums up to.
    probabilities = torch.softmax(logits.double() / sampling.temperature, -1)
    probabilities, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)
    # At least the first: of NaN none would be kept. Whoever draws looks at the logits, too.
    kept = (cumulative - probabilities < sampling.top_p).sum(-1, keepdim=True).clamp(min=1)
    total = cumulative.gather(-1, kept - 1)
    place = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    return tokens.gather(-1, place.minimum(kept - 1))[:, 0]


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        ids: its tokens, without the one that ended it.
        ended: whether it came to its end, rather than to the limit.
        finite: whether every logit maximum on the way was; else the answer means nothing.
    """

    ids: list[int]
    ended: bool
    finite: bool = True


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    ends: Sequence[int],
    *,
    pick: Pick = greedy,
    repeats: int = 1,
    hidden: int | None = None,
) -> list[Answer]:
    """Continue every prompt; equals ``model.generate`` of one prompt at a time, to rounding.

    Prompts are padded on the left, or run one by one where the model's logits would not survive that
    (``hf.model.padding``); ended rows are dropped from the batch and its cache. The prompts are read once, whatever
    ``repeats``.

    Args:
        model: a transformers model (not one around it) in evaluation mode that ``has_selectable_cache``.
        prompts: token ids, at least one each.
        limits: the most tokens that each prompt's answers may have, at least one.
        ends: ids that end an answer.
        pick: chooses the tokens.
        repeats: answers of each prompt.
        hidden: a token of the prompts that no other sees; None hides nothing.

    Returns:
        The answers to the first prompt, to the second, ...
    """

    def run(part: slice) -> list[Answer]:
        own = pick if part.start == 0 else partial(_pick_of, pick, part.start * repeats)
        return _decode(model, prompts[part], limits[part], ends, pick=own, repeats=repeats, hidden=hidden)

    return _in_batches(model, prompts, limits, run)


def _in_batches(
    model: Any, prompts: Sequence[Sequence[int]], limits: Sequence[int], run: Callable[[slice], list[Answer]]
) -> list[Answer]:
    """Run the prompts as one batch, or one by one where the model's logits would not survive the padding."""
    lengths = [len(prompt) for prompt in prompts]
    padding = padding_of(model)
    if not padding.keeps_apart(lengths, max(map(sum, zip(lengths, limits, strict=True)))):
        return run(slice(0, len(prompts)))
    answers = []
    for row in range(len(prompts)):
        rewind(model, padding.encodings)
        answers += run(slice(row, row + 1))
    rewind(model, padding.encodings)
    return answers


def _pick_of(pick: Pick, first: int, logits: Tensor, rows: Tensor, step: int) -> Tensor:
    return pick(logits, rows + first, step)


def _decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    ends: Sequence[int],
    *,
    pick: Pick,
    repeats: int,
    hidden: int | None,
) -> list[Answer]:
    device = model.device
    longest, count = max(map(len, prompts)), max(limits)
    ids, mask = _left_padded(prompts, longest, count, hidden)
    padded = not bool(mask.all())
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask[:, :longest].cumsum(1) - 1).clamp(min=0)
    ending, most = torch.tensor(ends, device=device), torch.tensor(limits, device=device).repeat_interleave(repeats)

    reads = accepted(model)
    cache = DynamicCache(config=model.config)

    def forward(tokens: Tensor, length: int) -> Tensor:
        known = {
            # Without padding, no mask: transformers would look through it, and wait for the device, every time.
            "attention_mask": mask[:, :length] if padded else None,
            "position_ids": positions,
            "logits_to_keep": 1,
        }
        arguments = {name: value for name, value in known.items() if name in reads}
        logits: Tensor = model(input_ids=tokens, past_key_values=cache, use_cache=True, **arguments).logits
        return logits[:, -1]

    logits = forward(ids, longest)
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)
        logits, mask, positions = (part.repeat_interleave(repeats, 0) for part in (logits, mask, positions))
    positions = positions[:, -1:]
    rows = torch.arange(len(logits), device=device)  # the answers still in the batch
    written = torch.full((len(logits), count), ends[0], device=device)
    finite = torch.ones(len(logits), dtype=torch.bool, device=device)
    done = ~finite
    every = _check_every(device)
    for step in range(count):
        sound = logits.amax(-1).isfinite()
        token = pick(logits, rows, step)
        written[rows, step] = token
        finite[rows] &= sound | done
        done |= torch.isin(token, ending) | (step + 1 >= most[rows]) | ~sound
        if step + 1 == count:
            break
        if (step + 1) % every == 0 and len(left := (~done).nonzero()[:, 0]) < len(rows):
            if not len(left):
                break
            cache.batch_select_indices(left)
            rows, done, token, mask, positions = (part[left] for part in (rows, done, token, mask, positions))
        positions = positions + (~done)[:, None]  # ended rows that are still there stay within the model's positions
        logits = forward(token[:, None], longest + step + 1)
    each = [limit for limit in limits for _ in range(repeats)]
    return [
        _answer(tokens[:limit], ends, sound)
        for tokens, limit, sound in zip(written.tolist(), each, finite.tolist(), strict=True)
    ]


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    ends: Sequence[int],
    *,
    hidden: int | None = None,
) -> list[Answer]:
    """As ``decode``, by ``model.generate``: for models whose cache cannot drop rows."""
    return _in_batches(model, prompts, limits, lambda part: _generate(model, prompts[part], limits[part], ends, hidden))


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    ends: Sequence[int],
    hidden: int | None,
) -> list[Answer]:
    longest, count = max(map(len, prompts)), max(limits)
    ids, mask = _left_padded(prompts, longest, 0, hidden)
    config = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=list(ends), pad_token_id=ends[0])
    watch = _Watch(len(prompts), model.device)
    # What is not set in a configuration comes from the model's own: its penalties, its beams.
    own, model.generation_config = model.generation_config, config
    try:
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([watch]),
        )
    finally:
        model.generation_config = own
    return [
        _answer(tokens[:limit], ends, sound)
        for tokens, limit, sound in zip(out[:, longest:].tolist(), limits, watch.finite.tolist(), strict=True)
    ]


class _Watch(LogitsProcessor):
    """Changes nothing; knows of which rows every logit maximum was finite."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.finite = torch.ones(rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        self.finite &= scores.amax(-1).isfinite()
        return scores


def has_selectable_cache(model: Any) -> bool:
    """Return whether the model's cache is keys and values of its tokens, from which ``decode`` can drop rows."""
    default = getattr(model, "_supports_default_dynamic_cache", None)
    if default is None or not default() or getattr(model, "_is_stateful", False):
        return False
    return all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=model.config).layers)


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: the tokenizer's end of sequence, as in training, and generation_config's.

    Raises:
        ValueError: neither has one.
    """
    config = getattr(model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])]
    ends = sorted({int(token) for token in found if token is not None})
    if not ends:
        raise ValueError(
            "expected an end-of-sequence token, got none from the tokenizer and the model's generation_config, so no "
            "answer would ever end; set `tokenizer.eos_token`"
        )
    return ends


def _check_every(device: torch.device) -> int:
    """Return how many tokens ended rows may stay in the batch: asking for them makes the host wait for a GPU."""
    return 1 if device.type == "cpu" else 8


def _left_padded(
    prompts: Sequence[Sequence[int]], longest: int, more: int, hidden: int | None
) -> tuple[Tensor, Tensor]:
    """Return ids (B, longest), and a mask (B, longest + more) that sees the prompt and all that follows it.

    Of the prompt, it does not see the tokens ``hidden``.
    """
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.ones(len(prompts), longest + more, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, : longest - len(prompt)] = 0
        if hidden is not None:
            mask[row, :longest][ids[row] == hidden] = 0
    return ids, mask


def _answer(tokens: list[int], ends: Sequence[int], finite: bool) -> Answer:
    end = next((i for i, token in enumerate(tokens) if token in ends), None)
    return Answer(tokens[:end], end is not None, finite)
