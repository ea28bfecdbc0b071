"""Evaluation protocols of TOFU, with the differences between TOFU's own code and open-unlearning.

Both protocols average the loss over the tokens of an answer and its end of sequence; a probability is exp of the
negative mean loss. Both average the losses of a row's false answers too, which is a geometric mean of probabilities.
They differ in the following:

| | ``tofu`` (arXiv 2401.06121, its ``evaluate_util.py``) | ``open-unlearning`` (arXiv 2506.12618) |
|---|---|---|
| rows of a split | the first 300 | all |
| maximum length of texts | 200 tokens | none |
| length of a generation | up to 200 tokens with the prompt, padded to the longest of 30 rows | 200 new tokens |
| labels and prompts | TOFU's | efface's; with ``compat``, open-unlearning's |
| tokens equal to the padding token | visible to attention | visible; with ``compat``, hidden |
| denominators | as in the formula | plus 1e-10 |

The 1e-10 matters for models whose training diverged: if the true answer's probability is below 1e-10, R no longer
compares it with the false answers. ``efface.hf.text.templates.get_template`` describes the three kinds of labels.
``docs/guides/evaluate.md`` lists where efface differs from both systems.
"""

from dataclasses import dataclass, replace

import numpy as np

from efface.evaluate.logs import FloatArray, truth_ratios
from efface.hf.text.templates import OPEN_UNLEARNING, TOFU


@dataclass(frozen=True)
class Protocol:
    """The settings and formulas of an evaluation protocol. In formulas, ``l`` is a mean token log-probability.

    Attributes:
        name: the key in ``PROTOCOLS``.
        rows: how many rows of a split to evaluate, from the first; None for all.
        max_length: maximum tokens of a text, and of a prompt with its generation; None for no limit.
        max_new_tokens: maximum tokens of a generation; None if ``max_length`` is the limit.
        epsilon: added to denominators.
        padded_rows: ``max_length`` counts a prompt as long as the longest prompt in its group of so many consecutive
            rows; None counts the prompt's own tokens.
        labels: the system whose prompts and labels are used, as ``compat`` of ``get_template``; None for efface's.
        hides_padding: whether the attention mask hides every token equal to the padding token, even one that ends a
            turn in the prompt. If the tokenizer has no padding token, the end-of-sequence token takes its part.
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
        """Return the probability among choices (rows,), e^l / (e^l + Σ_k e^l_k + ε).

        If ε is 0, the largest log-probability is subtracted first. The result is then correct even if every
        exponential would underflow.

        Args:
            correct: l (rows,) of the correct answers.
            false: l_k (rows, choices) of the false answers.
        """
        choices = np.column_stack([correct, false])
        weights = np.exp(choices if self.epsilon else choices - choices.max(axis=1, keepdims=True))
        result: FloatArray = weights[:, 0] / (weights.sum(axis=1) + self.epsilon)
        return result

    def truth_ratios(self, true: FloatArray, false: FloatArray) -> FloatArray:
        """Return R (rows,), the truth ratio e^(mean_k l_k) / (e^l + ε).

        If ε is 0, R is computed as the exponential of a difference, which is correct even if both probabilities would
        underflow.

        Args:
            true: l (rows,) of the true answers.
            false: l_k (rows, answers) of the false answers.
        """
        if not self.epsilon:
            return truth_ratios(true, false)
        with np.errstate(over="ignore"):  # the callers check the ratios for infinity
            result: FloatArray = np.exp(false.mean(axis=1)) / (np.exp(true) + self.epsilon)
        return result

    def forgotten(self, ratios: FloatArray) -> float:
        """Return the truth ratio of the forget split, mean min(R, 1 / (R + ε)).

        It is 1 if the model finds true and false answers equally likely.
        """
        with np.errstate(divide="ignore"):  # for R = 0 the minimum is R
            return float(np.minimum(ratios, 1 / (ratios + self.epsilon)).mean())

    def kept(self, ratios: FloatArray) -> float:
        """Return the truth ratio of the other splits, mean max(0, 1 − R).

        It is 1 if the model is sure of the true answers.
        """
        return float(np.maximum(0, 1 - ratios).mean())


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(OPEN_UNLEARNING, rows=None, max_length=None, max_new_tokens=200, epsilon=1e-10),
        Protocol(TOFU, rows=300, max_length=200, max_new_tokens=None, epsilon=0.0, padded_rows=30, labels=TOFU),
    )
}


def get_protocol(protocol: str | Protocol, compat: str | None = None) -> Protocol:
    """Return a protocol by name, optionally with open-unlearning's own labels, prompts and attention mask.

    Args:
        protocol: a name in ``PROTOCOLS``, or a ``Protocol``.
        compat: "open-unlearning" also reproduces that system's labels, prompts and attention mask exactly; None uses
            the protocol's own.

    Raises:
        ValueError: an unknown name, or ``compat`` with a protocol that has another system's labels.
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
            f"`compat`: expected protocol {OPEN_UNLEARNING!r} with compat {compat!r}, got {protocol.name!r}, which "
            f"uses the labels of {protocol.labels}; drop one of them"
        )
    name = protocol.name if protocol.hides_padding else f"{protocol.name}, compat"
    return replace(protocol, name=name, labels=compat, hides_padding=True)
