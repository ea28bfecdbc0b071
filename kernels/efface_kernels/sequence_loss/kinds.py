"""``Kind``, the built-in kinds of loss terms, with the number that identifies each on a device."""

from enum import IntEnum


class Kind(IntEnum):
    """Loss term of a sequence.

    L is the log-probability of the sequence, n its number of label tokens, ℓ the log-probability of a label token, and
    p = e^ℓ.
    """

    NONE = 0  # no term
    NLL = 1  # −L
    ASCENT = 2  # L
    NPO = 3  # −(2/β) log σ(−β (L − L_ref))
    SIMNPO = 4  # −(2/β) log σ(β (−L/n − δ))
    DPO = 5  # −(2/β) log σ(β [(L' − L'_ref) − (L − L_ref)]), where L' is that of the alternate, the next sequence
    ALTERNATE = 6  # second sequence of a DPO pair; its term is 0
    WGA = 7  # Σ p^β ℓ, where p^β is treated as a constant
    SATIMP = 8  # Σ p^β₁ (1 − p)^β₂ ℓ, where the factor of ℓ is treated as a constant
    CEU = 9  # −Σ log(1 − p), without the first `ignored` label tokens


NEED_REFERENCE = frozenset({Kind.NPO, Kind.DPO, Kind.ALTERNATE})
NEED_BETA = frozenset({Kind.NPO, Kind.SIMNPO, Kind.DPO})
