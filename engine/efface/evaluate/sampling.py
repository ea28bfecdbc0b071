"""Sampling: drawing tokens so that a row's draws depend on nothing but the row and the seed."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


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
