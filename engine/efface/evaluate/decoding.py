"""The decoding loop: it extends a batch of prompts token by token and drops rows from the batch as they end.

A token is the most probable one, or a sample that depends only on its row and the seed. Whether a model gives correct
logits for left-padded batches is measured once per model.
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
    """The measured effect of left padding on a model.

    Attributes:
        exact: whether the logits after left padding equal those of the unpadded prompt.
        limit: length in tokens from which on a sequence can change the position encoding of the other sequences in its
            batch; None if no length does.
        encodings: names of the modules that compute those position encodings.
    """

    exact: bool
    limit: int | None
    encodings: tuple[str, ...]

    def keeps_apart(self, lengths: Sequence[int], longest: int) -> bool:
        """Return whether prompts of these lengths must run one by one.

        ``longest`` is the maximum length of a prompt with its answer.
        """
        return (not self.exact and len(set(lengths)) > 1) or (self.limit is not None and longest >= self.limit)


def padding_of(model: PreTrainedModel) -> Padding:
    """Return the effect of left padding on ``model``, measured by two small forward passes on the first call.

    The result is stored on the model, so copies of the model have it too.
    """
    known: Padding | None = vars(model).get(_MEMORY)
    if known is None:
        encodings, limit = position_encodings(model)
        known = Padding(_exact(model), limit, encodings)
        setattr(model, _MEMORY, known)
    return known


def accepted(model: Any) -> set[str]:
    """Return the argument names of the model's own forward. In a fused model, it is one class further up."""
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
"""Takes logits (b, V), the numbers of their answers (b,) and the position of the token; returns tokens (b,)."""


def greedy(logits: Tensor, rows: Tensor, step: int) -> Tensor:  # noqa: ARG001 - a ``Pick``
    """Return the most probable token of each row."""
    return logits.argmax(-1)


@dataclass(frozen=True)
class Sampling:
    """Settings for sampling answers.

    Attributes:
        n: number of answers to each prompt.
        temperature: divisor of the logits.
        top_p: draw from the smallest set of most probable tokens whose total probability reaches this value (Holtzman
            et al. 2020, arXiv 1904.09751, section 3.1); 1 draws from all tokens.
        seed: seed of the draws.

    Raises:
        ValueError: ``n`` is below 1, ``temperature`` is not positive and finite, or ``top_p`` is not in (0, 1].
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
            raise ValueError(f"`top_p`: expected more than 0 and at most 1, got {self.top_p}")


def uniforms(sampling: Sampling, row: bytes, tokens: int) -> NDArray[np.float64]:
    """Return (n, tokens) random numbers in [0, 1), one for each token of each answer to a row with content ``row``.

    They are the only source of randomness and depend on the seed, the number of the answer and the row. The batches
    and the number of processes therefore do not change an answer, and a larger ``n`` only adds answers.
    """
    words = [hashlib.sha256(f"{sampling.seed}/{number}/".encode() + row).digest()[:16] for number in range(sampling.n)]
    return np.stack([np.random.default_rng(int.from_bytes(word, "little")).random(tokens) for word in words])


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Return tokens (B,) sampled by inverting the cumulative distribution at ``uniform``.

    The tokens are sorted by falling probability, and only those of the nucleus (``top_p``) can be drawn.

    Args:
        logits: (B, V).
        uniform: (B,) float64 in [0, 1), scaled by the total probability of the nucleus.
        sampling: temperature and top_p.
    """
    # A float32 cumulative sum over a vocabulary of 128k is not precise enough.
    probabilities = torch.softmax(logits.double() / sampling.temperature, -1)
    probabilities, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)
    # At least one token, because NaN probabilities would keep none. The decoding loop reports logits that are NaN.
    kept = (cumulative - probabilities < sampling.top_p).sum(-1, keepdim=True).clamp(min=1)
    total = cumulative.gather(-1, kept - 1)
    place = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    return tokens.gather(-1, place.minimum(kept - 1))[:, 0]


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        ids: its tokens, without the end token.
        ended: whether an end token ended it, rather than the limit.
        finite: whether the largest logit was finite at every step. Otherwise the answer is meaningless.
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
    """Generate ``repeats`` answers to each prompt.

    Greedy answers equal those of ``model.generate`` on one prompt at a time, up to rounding. Prompts are padded on the
    left, or run one by one if padding would change the model's logits (see ``Padding``). Ended rows are dropped from
    the batch and its cache. Each prompt is prefilled once, independent of ``repeats``.

    Args:
        model: a transformers model without wrappers, in evaluation mode, for which ``has_selectable_cache`` is true.
        prompts: token ids, at least one in each prompt.
        limits: maximum tokens of each prompt's answers, at least 1.
        ends: token ids that end an answer.
        pick: chooses the tokens.
        repeats: number of answers to each prompt.
        hidden: a token id that the attention mask hides in prompts; None hides nothing.

    Returns:
        The answers to the first prompt, then those to the second, and so on.
    """

    def run(part: slice) -> list[Answer]:
        own = pick if part.start == 0 else partial(_pick_of, pick, part.start * repeats)
        return _decode(model, prompts[part], limits[part], ends, pick=own, repeats=repeats, hidden=hidden)

    return _in_batches(model, prompts, limits, run)


def _in_batches(
    model: Any, prompts: Sequence[Sequence[int]], limits: Sequence[int], run: Callable[[slice], list[Answer]]
) -> list[Answer]:
    """Run the prompts as one batch, or one by one if padding would change the model's logits."""
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
            # Without padding, pass no mask: transformers would inspect it and synchronise with the device each time.
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
        positions = positions + (~done)[:, None]  # ended rows still in the batch must not exceed the model's positions
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
    """Return greedy answers as ``decode`` does, by ``model.generate``. For models whose cache cannot drop rows."""
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
    # `generate` takes settings that `config` leaves out (penalties, beams) from the model's own configuration.
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
    """A logits processor that changes no logits and records for each row whether its largest logit stayed finite."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.finite = torch.ones(rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        self.finite &= scores.amax(-1).isfinite()
        return scores


def has_selectable_cache(model: Any) -> bool:
    """Return whether the model's cache holds only keys and values of tokens, so that ``decode`` can drop rows."""
    default = getattr(model, "_supports_default_dynamic_cache", None)
    if default is None or not default() or getattr(model, "_is_stateful", False):
        return False
    return all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=model.config).layers)


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the token ids that end an answer, from the tokenizer and from the model's generation_config.

    The tokenizer's end-of-sequence token is included because training ends answers with it.

    Raises:
        ValueError: neither the tokenizer nor the generation_config defines an end-of-sequence token.
    """
    config = getattr(model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])]
    ends = sorted({int(token) for token in found if token is not None})
    if not ends:
        raise ValueError(
            "expected an end-of-sequence token in the tokenizer or the model's generation_config, got none, so that "
            "answers would never end; set `tokenizer.eos_token`"
        )
    return ends


def _check_every(device: torch.device) -> int:
    """Return after how many tokens ended rows are dropped. On a GPU, each check synchronises the host."""
    return 1 if device.type == "cpu" else 8


def _left_padded(
    prompts: Sequence[Sequence[int]], longest: int, more: int, hidden: int | None
) -> tuple[Tensor, Tensor]:
    """Return left-padded ids (B, longest) and the attention mask (B, longest + more).

    The mask is 0 on padding and on prompt tokens equal to ``hidden``, and 1 on all others and on the ``more`` tokens
    that follow the prompt.
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
