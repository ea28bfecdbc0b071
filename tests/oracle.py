"""The independent fp64 oracle: materialised logits, Python loops, formulas typed in from the papers. Shares no code
with efface.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Case:
    """A named problem: sequences of label rows, a head, maybe a reference."""

    name: str
    lengths: tuple[int, ...]  # label rows of each sequence
    hidden_size: int = 12
    vocabulary: int = 40
    bias: bool = False
    softcap: float | None = None
    chunk_rows: int | None = None
    scale: float = 1.0  # of the hidden states: large ones memorise
    reference_sequences: int | None = None  # None: all
    reference_vocabulary: int | None = None

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("one row", (1,)),
    Case("one-token answers", (1, 1, 1, 1), chunk_rows=2),
    Case("mixed lengths", (3, 1, 7, 2, 5)),
    Case("one chunk a sequence", (3, 4, 2), chunk_rows=4),
    Case("sequence longer than the workspace", (2, 11, 3), chunk_rows=4),
    Case("workspace of one row", (2, 3), chunk_rows=1),
    Case("vocabulary of two", (3, 2), vocabulary=2),
    Case("prime vocabulary", (4, 3), vocabulary=7),
    Case("GPT-2's vocabulary", (4, 3), vocabulary=50257, hidden_size=8),
    Case("bias, as Phi", (3, 1, 5), bias=True, chunk_rows=5),
    Case("soft-cap, as Gemma-2", (3, 1, 5), softcap=3.0, chunk_rows=5),
    Case("bias and soft-cap, long", (9, 2), bias=True, softcap=2.0, chunk_rows=4),
    Case("memorised targets", (3, 6, 2), scale=6.0, chunk_rows=6),
    Case("reference for some", (3, 2, 4, 1), reference_sequences=2, chunk_rows=4),
    Case("reference with another vocabulary", (3, 2), reference_vocabulary=53),
)


@dataclass
class Problem:
    """Leaf tensors of a case, in some dtype."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    offsets: tuple[int, ...]
    reference_hidden: Tensor
    reference_weight: Tensor

    def leaves(self) -> dict[str, Tensor]:
        tensors = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> Problem:
    """The same numbers on every device and in every dtype: rounded to it, whatever comes after is its error."""
    g = torch.Generator().manual_seed(seed)
    n, d, v = sum(case.lengths), case.hidden_size, case.vocabulary
    device = torch.get_default_device()
    like = {"generator": g, "dtype": torch.float64, "device": "cpu"}
    hidden = torch.randn(n, d, **like) * case.scale
    weight = torch.randn(v, d, **like) / math.sqrt(d) * 2
    targets = torch.randint(v, (n,), generator=g, device="cpu")
    targets[-1] = v - 1  # the last class
    if case.scale > 1:  # memorised: the target is mostly the largest logit
        targets = (hidden @ weight.T).argmax(1)
    bias = torch.randn(v, **like) if case.bias else None
    sequences = len(case.lengths) if case.reference_sequences is None else case.reference_sequences
    m = sum(case.lengths[:sequences])
    reference_hidden = torch.randn(m, d + 1, **like)
    reference_weight = torch.randn(case.reference_vocabulary or v, d + 1, **like)
    offsets = [0]
    for length in case.lengths:
        offsets.append(offsets[-1] + length)

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype).requires_grad_()

    return Problem(
        leaf(hidden),
        leaf(weight),
        None if bias is None else leaf(bias),
        targets.to(device),
        tuple(offsets),
        reference_hidden.to(device, dtype),
        reference_weight.to(device, dtype),
    )


def capped_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Materialised logits (N, V), after the cap."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()  # what eager training does
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def divergences(logits: Tensor, frozen: Tensor, targets: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """KL(q‖p) and the entropy of q, row by row; the target's frozen logit is lowered by ``shift``."""
    kl, entropy = [], []
    for i in range(len(targets)):
        z, zr = logits[i], frozen[i].clone()
        zr[targets[i]] -= shift
        log_p = z - z.max().detach() - torch.log(torch.exp(z - z.max().detach()).sum())
        log_q = zr - zr.max() - torch.log(torch.exp(zr - zr.max()).sum())
        kl.append((torch.exp(log_q) * (log_q - log_p)).sum())
        entropy.append(-(torch.exp(log_q) * log_q).sum())
    if not kl:
        return logits.sum(1), logits.sum(1)
    return torch.stack(kl), torch.stack(entropy)


def logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None) -> Tensor:
    """ℓ (N,), row by row from materialised logits."""
    logits = capped_logits(hidden, weight, bias, softcap)
    rows = []
    for i in range(len(targets)):
        shifted = logits[i] - logits[i].max().detach()
        rows.append(shifted[targets[i]] - torch.log(torch.exp(shifted).sum()))
    return torch.stack(rows) if rows else hidden.new_zeros(0)


def sums(values: Tensor, offsets: tuple[int, ...]) -> list[Tensor]:
    """L_s for each sequence."""
    return [values[start:stop].sum() for start, stop in itertools.pairwise(offsets)]


def sigmoid_log(x: Tensor) -> Tensor:
    """log σ(x)."""
    return torch.minimum(x, torch.zeros_like(x)) - torch.log1p(torch.exp(-x.abs()))


def npo(sequence_sums: list[Tensor], reference_sums: list[Tensor], beta: float) -> Tensor:
    """Zhang et al. 2024, equation 3."""
    total = torch.zeros((), dtype=sequence_sums[0].dtype)
    for policy, reference in zip(sequence_sums, reference_sums, strict=True):
        total = total - 2 / beta * sigmoid_log(-beta * (policy - reference))
    return total / len(sequence_sums)


def dpo(sequence_sums: list[Tensor], reference_sums: list[Tensor], pairs: int, beta: float) -> Tensor:
    """Rafailov et al. 2023, equation 7, times 2/β: sequence 2i loses against 2i + 1. Summed over the pairs."""
    total = torch.zeros((), dtype=sequence_sums[0].dtype)
    for loser in range(0, 2 * pairs, 2):
        lost = sequence_sums[loser] - reference_sums[loser]
        won = sequence_sums[loser + 1] - reference_sums[loser + 1]
        total = total - 2 / beta * sigmoid_log(beta * (won - lost))
    return total


def simnpo(sequence_sums: list[Tensor], lengths: tuple[int, ...], beta: float, delta: float) -> Tensor:
    """Fan et al. 2024, equation 4."""
    total = torch.zeros((), dtype=sequence_sums[0].dtype)
    for policy, length in zip(sequence_sums, lengths, strict=True):
        total = total - 2 / beta * sigmoid_log(-beta / length * policy - beta * delta)
    return total / len(sequence_sums)


def exact(problem: Problem) -> Problem:
    """The same, already rounded, numbers in fp64."""
    doubled = Problem(**vars(problem))
    for name, tensor in vars(problem).items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            setattr(doubled, name, tensor.detach().double().requires_grad_(tensor.requires_grad))
    return doubled


def rms(tensor: Tensor) -> float:
    """Root mean square, in fp64."""
    return tensor.double().pow(2).mean().sqrt().item() if tensor.numel() else 0.0


def assert_as_exact(name: str, ours: Tensor, eager: Tensor, gold: Tensor, dtype: torch.dtype) -> None:
    """rms(ours − gold) ≤ 2 · rms(torch − gold) + k · eps · rms(gold), with eps of ``dtype``.

    k = 4: a scalar's eager error may be zero by luck. In fp64 the gold is as inexact as ours and eager's error is 0
    by construction: there k = 64.
    """
    assert ours.shape == gold.shape, name
    assert torch.isfinite(ours).all(), name
    k = 64 if dtype == torch.float64 else 4
    error, allowed = rms(ours.double() - gold), 2 * rms(eager.double() - gold) + k * torch.finfo(dtype).eps * rms(gold)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}, rms(gold) {rms(gold):.3e}"
