"""The independent fp64 oracle: materialised logits, Python loops, formulas typed in from the papers.

It shares no code with efface.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Case:
    """A named problem: the label rows of each sequence, a head, optionally a reference model."""

    name: str
    lengths: tuple[int, ...]  # label rows of each sequence
    hidden_size: int = 12
    vocabulary: int = 40
    bias: bool = False
    softcap: float | None = None
    chunk_rows: int | None = None
    scale: float = 1.0  # factor on the hidden states; large ones make memorised targets
    reference_sequences: int | None = None  # number of sequences with a reference; None: all
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


def within_reach(case: Case, backend: str) -> Case:
    """Return the case with at most 5003 classes if Triton's interpreter runs it; larger vocabularies take too long.

    5003 logits exercise the same code as 50257: a row is several whole blocks and a partial one. ``test_triton_passes``
    runs single passes with the real vocabularies.
    """
    interpreted = backend == "triton" and torch.get_default_device().type == "cpu"
    return replace(case, vocabulary=min(case.vocabulary, 5003)) if interpreted else case


@dataclass
class Problem:
    """Leaf tensors of a case, in a given dtype."""

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
    """Draw the same numbers on every device and for every dtype, rounded to ``dtype``.

    The fp64 reference starts from the rounded numbers, so that only later errors count.
    """
    g = torch.Generator().manual_seed(seed)
    n, d, v = sum(case.lengths), case.hidden_size, case.vocabulary
    device = torch.get_default_device()
    like = {"generator": g, "dtype": torch.float64, "device": "cpu"}
    hidden = torch.randn(n, d, **like) * case.scale
    weight = torch.randn(v, d, **like) / math.sqrt(d) * 2
    targets = torch.randint(v, (n,), generator=g, device="cpu")
    targets[-1] = v - 1  # the last class
    if case.scale > 1:  # memorised: the target has the largest logit
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
    """Return the materialised logits (N, V), after the soft-cap."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()  # as eager training does
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def divergences(logits: Tensor, frozen: Tensor, targets: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """Return KL(q‖p) and the entropy of q, row by row. The target's reference logit is lowered by ``shift``."""
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
    """Return ℓ (N,), row by row from materialised logits."""
    logits = capped_logits(hidden, weight, bias, softcap)
    rows = []
    for i in range(len(targets)):
        shifted = logits[i] - logits[i].max().detach()
        rows.append(shifted[targets[i]] - torch.log(torch.exp(shifted).sum()))
    return torch.stack(rows) if rows else hidden.new_zeros(0)


def split(values: Tensor, offsets: Sequence[int]) -> list[Tensor]:
    """Return the rows of each sequence."""
    return [values[start:stop] for start, stop in itertools.pairwise(offsets)]


def sums(values: Tensor, offsets: Sequence[int]) -> list[Tensor]:
    """Return L_s for each sequence."""
    return [rows.sum() for rows in split(values, offsets)]


def sigmoid_log(x: Tensor) -> Tensor:
    """Return log σ(x)."""
    return torch.minimum(x, torch.zeros_like(x)) - torch.log1p(torch.exp(-x.abs()))


def nll(rows: Tensor) -> Tensor:
    """Return −Σ ℓ."""
    return -ascent(rows)


def ascent(rows: Tensor) -> Tensor:
    """Maini et al. 2024, section 4: Σ ℓ."""
    total = rows.new_zeros(())
    for row in rows:
        total = total + row
    return total


def npo(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Zhang et al. 2024, equation 3."""
    return -2 / beta * sigmoid_log(-beta * (policy - reference))


def simnpo(policy: Tensor, length: int, beta: float, delta: float) -> Tensor:
    """Fan et al. 2024, equation 4."""
    return -2 / beta * sigmoid_log(-beta / length * policy - beta * delta)


def dpo(lost: tuple[Tensor, Tensor], won: tuple[Tensor, Tensor], beta: float) -> Tensor:
    """Rafailov et al. 2023, equation 7, times 2/β. ``lost`` and ``won`` are each the pair (L, L_ref)."""
    return -2 / beta * sigmoid_log(beta * ((won[0] - won[1]) - (lost[0] - lost[1])))


def wga(rows: Tensor, beta: float) -> Tensor:
    """Wang et al. 2025, arXiv 2502.19301: Σ p^β ℓ, with the weight p^β held constant."""
    total = rows.new_zeros(())
    for row in rows:
        total = total + torch.exp(row.detach()) ** beta * row
    return total


def satimp(rows: Tensor, beta1: float, beta2: float) -> Tensor:
    """Yang et al. 2025, arXiv 2505.11953: Σ p^β₁ (1 − p)^β₂ ℓ, with the weight held constant."""
    total = rows.new_zeros(())
    for row in rows:
        known = row.detach()
        total = total + torch.exp(known) ** beta1 * (-torch.expm1(known)) ** beta2 * row
    return total


def ceu(rows: Tensor, ignored: int, eps: float) -> Tensor:
    """Return −Σ log(1 − p + eps) without the first ``ignored`` rows.

    It equals ``ceu_cross_entropy`` up to a constant, and is finite at p = 1.
    """
    total = 0 * rows.sum()  # differentiable even if no row counts
    for row in rows[ignored:]:
        # use the form that keeps the digits of the value and of its derivative, p
        rest = 1 - torch.exp(row) if row < -1 else -torch.expm1(row)
        total = total - torch.log(eps + rest)
    return total


def ceu_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Yang 2025, arXiv 2503.01224: cross entropy to the model's own softmax without the true token, held constant."""
    total = logits.new_zeros(())
    for row, target in zip(logits, targets, strict=True):
        others = row.detach().clone()
        others[target] = -math.inf
        q = torch.exp(others - others.max()) / torch.exp(others - others.max()).sum()
        shifted = row - row.max().detach()
        log_p = shifted - torch.log(torch.exp(shifted).sum())
        total = total - (q * log_p).sum()
    return total


def term(declared: Any, rows: list[Tensor], references: list[Tensor], eps: float) -> Tensor:
    """Return one sequence's weighted term.

    ``declared`` is an ``efface_kernels.Term``; only its names are used. ``rows`` and ``references`` hold ℓ and L_ref of
    the sequence and of the following one, which DPO prefers. ``eps`` is that of the dtype in which CE-U is computed.
    """
    own, reference = rows[0], references[0]
    match declared.kind.name:
        case "NONE" | "ALTERNATE":
            value = 0 * ascent(own)
        case "NLL":
            value = nll(own)
        case "ASCENT":
            value = ascent(own)
        case "NPO":
            value = npo(ascent(own), reference, declared.beta)
        case "SIMNPO":
            value = simnpo(ascent(own), len(own), declared.beta, declared.delta)
        case "DPO":
            value = dpo((ascent(own), reference), (ascent(rows[1]), references[1]), declared.beta)
        case "WGA":
            value = wga(own, declared.beta)
        case "SATIMP":
            value = satimp(own, declared.beta1, declared.beta2)
        case "CEU":
            value = ceu(own, declared.ignored, eps)
        case name:
            raise AssertionError(name)
    return declared.weight * value


def terms(declared: Sequence[Any], rows: list[Tensor], references: list[Tensor], eps: float) -> Tensor:
    """Return the weighted terms (S,) of a batch of whole sequences."""
    each = [term(one, rows[i : i + 2], references[i : i + 2], eps) for i, one in enumerate(declared)]
    return torch.stack(each)


def exact(problem: Problem) -> Problem:
    """Return the same numbers, already rounded, as fp64 tensors."""
    doubled = Problem(**vars(problem))
    for name, tensor in vars(problem).items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            setattr(doubled, name, tensor.detach().double().requires_grad_(tensor.requires_grad))
    return doubled


def rms(tensor: Tensor) -> float:
    """Return the root mean square, in fp64."""
    return tensor.double().pow(2).mean().sqrt().item() if tensor.numel() else 0.0


def assert_as_exact(
    name: str, ours: Tensor, eager: Tensor, gold: Tensor, dtype: torch.dtype, exponent: float = 0
) -> None:
    """Assert rms(ours − gold) ≤ 2 · rms(torch − gold) + k · eps · rms(gold), with eps of ``dtype``.

    k = 4, because the eager error of a scalar can be zero by luck. In fp64, the fp64 reference (``gold``) is as inexact
    as ours and eager's error is 0 by construction, so k = 64 there. k is multiplied by 1 + ``exponent`` where the
    terms, or c, contain powers of p: an error of ℓ = −13, which NLL divides by 13, is multiplied by the exponent.
    """
    assert ours.shape == gold.shape, name
    assert torch.isfinite(ours).all(), name
    k = 64 * (1 + exponent) if dtype == torch.float64 else 4
    error, allowed = rms(ours.double() - gold), 2 * rms(eager.double() - gold) + k * torch.finfo(dtype).eps * rms(gold)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}, rms(gold) {rms(gold):.3e}"


# ---- the largest single tensor that an operation allocates


class LargestTensor(TorchDispatchMode):
    """A dispatch mode that records the size, in bytes, of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, Tensor):
                self.largest = max(self.largest, item.nbytes)
        return out
