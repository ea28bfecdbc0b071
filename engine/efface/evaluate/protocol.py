"""Evaluation protocols of TOFU: what two systems of the same name do differently, in one place.

Both average over the tokens of an answer and its end of sequence (a probability is exp of the mean), and over the
false answers of a row geometrically: they average losses. Where they differ:

| | ``tofu`` (arXiv 2401.06121, its ``evaluate_util.py``) | ``open-unlearning`` (arXiv 2506.12618) |
|---|---|---|
| rows of a split | the first 300 | all |
| texts | cut to 200 tokens | whole |
| generation | to 200 tokens, with the prompt, padded to the longest of 30 | 200 tokens |
| labels, prompts | TOFU's | efface's; with ``compat``, open-unlearning's |
| padding token | seen | seen; with ``compat``, no token of its kind is seen in texts either |
| divisions | as written | 1e-10 added to the denominators |

The 1e-10 shows in models that were ruined: where the true answer has a probability of less than that, R no longer
compares it with the false ones. Whose labels are what is in ``efface.hf.text.templates.get_template``; what neither
follows is in ``docs/guides/evaluate.md``.
"""

from dataclasses import dataclass, replace

import numpy as np

from efface.evaluate.logs import FloatArray, truth_ratios
from efface.hf.text.templates import OPEN_UNLEARNING, TOFU


@dataclass(frozen=True)
class Protocol:
    """How rows are chosen, generated and counted; ``l`` are mean log-probabilities of a token.

    Attributes:
        name: in ``PROTOCOLS``.
        rows: of a split, from its first; None is all.
        max_length: tokens of a text, and of a prompt with its generation; None is no limit.
        max_new_tokens: of a generation; None leaves it to ``max_length``.
        epsilon: what denominators get.
        padded_rows: consecutive rows whose prompts ``max_length`` counts as long as their longest; None pads none.
        labels: whose prompts and labels, as ``compat`` of ``get_template``; None is efface's.
        hides_padding: whether no token sees one that equals the padding token (without one, the end of sequence), and
            be it the end of a turn in the prompt.
    """

    name: str
    rows: int | None
    max_length: int | None
    max_new_tokens: int | None
    epsilon: float
    padded_rows: int | None = None
    labels: str | None = None
    hides_padding: bool = False

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
        if not self.epsilon:
            return truth_ratios(true, false)
        with np.errstate(over="ignore"):  # whoever uses the ratios refuses infinity
            result: FloatArray = np.exp(false.mean(axis=1)) / (np.exp(true) + self.epsilon)
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
        Protocol(OPEN_UNLEARNING, rows=None, max_length=None, max_new_tokens=200, epsilon=1e-10),
        Protocol(TOFU, rows=300, max_length=200, max_new_tokens=None, epsilon=0.0, padded_rows=30, labels=TOFU),
    )
}


def get_protocol(protocol: str | Protocol, compat: str | None = None) -> Protocol:
    """Return the protocol of a name.

    Args:
        protocol: a name in ``PROTOCOLS``, or a ``Protocol``.
        compat: "open-unlearning" takes its labels, prompts and attention mask into its protocol, quirk for quirk.

    Raises:
        ValueError: a name that is not known, or a protocol that has no such thing.
    """
    if isinstance(protocol, str):
        if protocol not in PROTOCOLS:
            raise ValueError(f"`protocol`: expected one of {', '.join(map(repr, PROTOCOLS))}, got {protocol!r}")
        protocol = PROTOCOLS[protocol]
    if compat is None:
        return protocol
    if compat != OPEN_UNLEARNING:
        raise ValueError(f"`compat`: expected {OPEN_UNLEARNING!r} or None, got {compat!r}")
    if protocol.labels not in (None, compat):
        raise ValueError(
            f"`compat`: expected protocol {OPEN_UNLEARNING!r} beside {compat!r}, got {protocol.name!r}, whose labels "
            f"are {protocol.labels}'s; drop one of them"
        )
    name = protocol.name if protocol.hides_padding else f"{protocol.name}, compat"
    return replace(protocol, name=name, labels=compat, hides_padding=True)
