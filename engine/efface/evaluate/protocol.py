"""Evaluation protocols of TOFU: what two systems of the same name do differently, in one place.

Both average over the tokens of an answer and its end of sequence (a probability is exp of the mean), and over the
false answers of a row geometrically: they average losses. Where they differ:

| | ``tofu`` (arXiv 2401.06121, its ``evaluate_util.py``) | ``open-unlearning`` (arXiv 2506.12618) |
|---|---|---|
| rows of a split | the first 300 | all |
| texts | cut to 200 tokens | whole |
| generation | to 200 tokens, with the prompt | 200 tokens |
| divisions | as written | 1e-10 added to the denominators |

The 1e-10 shows in models that were ruined: where the true answer has a probability of less than that, R no longer
compares it with the false ones. What is not followed: open-unlearning cuts texts of templates that are no chat to 512
tokens, which no text of TOFU has.
"""

from dataclasses import dataclass

import numpy as np

from efface.evaluate.logs import FloatArray


@dataclass(frozen=True)
class Protocol:
    """How rows are chosen, generated and counted; ``l`` are mean log-probabilities of a token.

    Attributes:
        name: in ``PROTOCOLS``.
        rows: of a split, from its first; None is all.
        max_length: tokens of a text, and of a prompt with its generation; None is no limit.
        max_new_tokens: of a generation; None leaves it to ``max_length``.
        epsilon: what denominators get.
    """

    name: str
    rows: int | None
    max_length: int | None
    max_new_tokens: int | None
    epsilon: float

    def share(self, correct: FloatArray, false: FloatArray) -> FloatArray:
        """Probability among choices (rows,): e^l / (e^l + Σ_k e^l_k + ε), from l (rows,) and l_k (rows, choices).

        Without ε the largest is taken out first, which is right where all of them underflow.
        """
        choices = np.column_stack([correct, false])
        weights = np.exp(choices if self.epsilon else choices - choices.max(axis=1, keepdims=True))
        result: FloatArray = weights[:, 0] / (weights.sum(axis=1) + self.epsilon)
        return result

    def truth_ratios(self, true: FloatArray, false: FloatArray) -> FloatArray:
        """R (rows,): e^(mean_k l_k) / (e^l + ε), from l (rows,) of a true answer and l_k (rows, answers) of false ones.

        Without ε it is taken as one exponential of a difference, which is right where both probabilities underflow.
        """
        mean = false.mean(axis=1)
        with np.errstate(over="ignore"):  # whoever uses the ratios refuses infinity
            result: FloatArray = np.exp(mean) / (np.exp(true) + self.epsilon) if self.epsilon else np.exp(mean - true)
        return result

    def forgotten(self, ratios: FloatArray) -> float:
        """Truth ratio of the forget split: mean min(R, 1 / (R + ε)); 1 where true and false are told apart least."""
        with np.errstate(divide="ignore"):  # R = 0 is the least of both
            return float(np.minimum(ratios, 1 / (ratios + self.epsilon)).mean())

    def kept(self, ratios: FloatArray) -> float:
        """Truth ratio of the other splits: mean max(0, 1 − R); 1 where the model is sure of the true answer."""
        return float(np.maximum(0, 1 - ratios).mean())


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("open-unlearning", rows=None, max_length=None, max_new_tokens=200, epsilon=1e-10),
        Protocol("tofu", rows=300, max_length=200, max_new_tokens=None, epsilon=0.0),
    )
}


def get_protocol(protocol: str | Protocol) -> Protocol:
    """Return the protocol of a name.

    Raises:
        ValueError: a name that is not known.
    """
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"`protocol`: expected one of {', '.join(map(repr, PROTOCOLS))}, got {protocol!r}")
    return PROTOCOLS[protocol]
