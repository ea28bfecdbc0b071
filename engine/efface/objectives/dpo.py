"""Direct preference optimization: the alternate answer over the one to forget (Rafailov et al. 2023, arXiv 2305.18290).

IdkDPO prefers "I don't know" (TOFU, arXiv 2401.06121), AltPO a plausible other answer (arXiv 2409.13474).
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from efface_kernels import Sequences


def dpo_terms(sequences: Sequences, *, beta: float) -> Tensor:
    """−(2/β) log σ(β [(L_w − L_w,ref) − (L_l − L_l,ref)]); l a forget sequence, w its alternate, which follows it.

    Defined for forget sequences; every other sequence's term means nothing.
    """
    if sequences.reference_sums is None:
        raise ValueError(
            "DPO needs the reference model's sequence log-probabilities, got none; give a live or cached reference"
        )
    ratio = sequences.sums - sequences.reference_sums
    return -2 / beta * logsigmoid(beta * (sequences.following(ratio) - ratio))
