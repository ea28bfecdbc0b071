"""The kinds of loss terms that need no Python function, by the number that stands for each on a device."""

from enum import IntEnum


class Kind(IntEnum):
    """What a sequence adds to the loss; L its log-probability, ℓ and p those of its label tokens, n their number."""

    NONE = 0  # nothing
    NLL = 1  # −L
    ASCENT = 2  # L
    NPO = 3  # −(2/β) log σ(−β (L − L_ref))
    SIMNPO = 4  # −(2/β) log σ(β (−L/n − δ))
    DPO = 5  # −(2/β) log σ(β [(L' − L'_ref) − (L − L_ref)]), L' the alternate, the sequence that follows
    ALTERNATE = 6  # nothing of its own: the second of a DPO pair
    WGA = 7  # Σ p^β ℓ, p^β a constant
    SATIMP = 8  # Σ p^β₁ (1 − p)^β₂ ℓ, the weight a constant
    CEU = 9  # −Σ log(1 − p), without the first label tokens


NEED_REFERENCE = frozenset({Kind.NPO, Kind.DPO, Kind.ALTERNATE})
NEED_BETA = frozenset({Kind.NPO, Kind.SIMNPO, Kind.DPO})
