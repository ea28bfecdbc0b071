"""Inputs of the loss suite: objectives, shapes, a batch for each, and its gradients in fp64.

The objectives are written as in open-unlearning, from the targets' log-probabilities. The softmax of a batch resembles
that of an unlearning run. The fp64 gradients use the chain rule from the logits, without code of efface and without
torch's autograd.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from efface_kernels import Head, Kind, RowOffsets, SequenceRule, Term, segment_sums

BETA = 0.1  # of NPO and DPO
SIMNPO_BETA, SIMNPO_DELTA = 4.5, 0.0
FORGET, OTHER = 0, 1  # roles; OTHER is DPO's alternate or GradDiff's retain sequence
LENGTH = 32  # label rows of a sequence
SHARE = 0.7  # share of the rows that are memorised

# The number of products of 2 N D V floating-point operations that each mode needs: Z, Zr, Z W, Zᵀ h.
FLOOR = {"live": 4, "cached": 3, "frozen, cached": 2, "no reference": 3, "frozen": 2}


def npo(logprobs: Tensor, offsets: Tensor, reference: Tensor) -> Tensor:
    """Return the mean over sequences of −(2/β) log σ(−β (L − L_ref))."""
    return -2 / BETA * F.logsigmoid(-BETA * (segment_sums(logprobs, offsets) - reference)).mean()


def simnpo(logprobs: Tensor, offsets: Tensor, _reference: Tensor) -> Tensor:
    """Return the mean over sequences of −(2/β) log σ(β (−L/n − δ))."""
    mean_nll = -segment_sums(logprobs, offsets) / offsets.diff()
    return -2 / SIMNPO_BETA * F.logsigmoid(SIMNPO_BETA * (mean_nll - SIMNPO_DELTA)).mean()


def dpo(logprobs: Tensor, offsets: Tensor, reference: Tensor) -> Tensor:
    """Return the mean over pairs of −(2/β) log σ(β (log-ratio of the alternate − log-ratio of the forget sequence))."""
    ratio = segment_sums(logprobs, offsets) - reference
    return -2 / BETA * F.logsigmoid(BETA * (ratio[1::2] - ratio[::2])).mean()


def nll(logprobs: Tensor, _offsets: Tensor, _reference: Tensor) -> Tensor:
    """Return the mean over rows of −ℓ: a retain loss, or fine-tuning."""
    return -logprobs.mean()


def graddiff(logprobs: Tensor, _offsets: Tensor, _reference: Tensor) -> Tensor:
    """Return the mean of ℓ over the first half of the rows (forget), plus that of −ℓ over the second half (retain)."""
    half = len(logprobs) // 2
    return logprobs[:half].mean() - logprobs[half:].mean()


# log-probabilities (N,), row offsets (S + 1), reference sums (S,) -> loss
FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "NPO": npo,
    "SimNPO": simnpo,
    "DPO": dpo,
    "NLL": nll,
    "GradDiff": graddiff,
}

KL = "KL retain"  # mean over rows of KL(p_ref‖p): of whole distributions, not of targets
OBJECTIVES = (*FUNCTIONS, KL)


def roles(objective: str, sequences: int) -> Tensor:
    """Return the role of each sequence, (S,)."""
    every = torch.zeros(sequences, dtype=torch.int8)
    if objective == "DPO":
        every[1::2] = OTHER
    if objective == "GradDiff":
        every[sequences // 2 :] = OTHER
    return every


def rule(objective: str, rows: int, roles_on_device: Tensor) -> SequenceRule | None:
    """Return the objective as a rule of efface, or None for KL, which is not a rule."""
    s = len(roles_on_device)
    terms = {
        "NPO": {FORGET: Term(Kind.NPO, 1 / s, beta=BETA)},
        "SimNPO": {FORGET: Term(Kind.SIMNPO, 1 / s, beta=SIMNPO_BETA, delta=SIMNPO_DELTA)},
        "DPO": {FORGET: Term(Kind.DPO, 2 / s, beta=BETA), OTHER: Term(Kind.ALTERNATE)},
        "NLL": {FORGET: Term(Kind.NLL, 1 / rows)},
        "GradDiff": {FORGET: Term(Kind.ASCENT, 2 / rows), OTHER: Term(Kind.NLL, 2 / rows)},
    }
    return SequenceRule.of(roles_on_device, terms[objective]) if objective in terms else None


@dataclass(frozen=True)
class LossShape:
    """A named shape of the suite; N is a multiple of 64."""

    n: int
    d: int
    v: int
    dtype: torch.dtype
    objective: str = "NPO"
    modes: tuple[str, ...] = ("live",)
    bias: bool = False
    softcap: float | None = None
    unlearned: bool = False  # the state after unlearning, see ``make_inputs``
    device: str = "cpu"


_HALF, _FULL = torch.bfloat16, torch.float32
_NPO, _FREE = ("live", "cached", "frozen, cached"), ("no reference", "frozen")
_1B, _3B, _7B, _PHI, _GEMMA = (2048, 128256), (3072, 128256), (4096, 32000), (2048, 51200), (2304, 256000)
_SMALL = (1024, 32000)  # Llama-2's vocabulary, with a D that a CPU handles in a second


def _gpu(
    n: int, head: tuple[int, int], objective: str = "NPO", modes: tuple[str, ...] = ("live",), **more: Any
) -> LossShape:
    return LossShape(n, *head, _HALF, objective, modes, device="cuda", **more)


SHAPES = {
    "smoke": LossShape(64, 64, 512, _FULL, "NPO", _NPO),
    # The main claim: NPO near the floor. Then the effects of the dtype, a vocabulary of 128256 and the state.
    "Llama-2 head, D 1024, bf16": LossShape(1024, *_SMALL, _HALF, "NPO", _NPO),
    "Llama-3.2-1B head, bf16": LossShape(256, *_1B, _HALF, "NPO", ("live", "cached")),
    "Llama-2 head, D 1024, fp32": LossShape(1024, *_SMALL, _FULL),
    "Llama-2 head, 256 rows": LossShape(256, *_SMALL, _HALF),
    "Llama-2 head, 256 rows, after unlearning": LossShape(256, *_SMALL, _HALF, unlearned=True),
    "SimNPO": LossShape(256, *_SMALL, _HALF, "SimNPO", _FREE),
    "DPO": LossShape(256, *_SMALL, _HALF, "DPO", ("live", "cached")),
    "NLL": LossShape(256, *_SMALL, _HALF, "NLL", ("no reference",)),
    "GradDiff": LossShape(256, *_SMALL, _HALF, "GradDiff", ("no reference",)),
    "KL retain": LossShape(256, *_SMALL, _HALF, KL),
    # Heads of real models, with all modes of NPO: distance to the floor.
    "GPU: Llama-3.2-1B": _gpu(8192, _1B, modes=_NPO),
    "GPU: Llama-3.2-3B": _gpu(8192, _3B, modes=_NPO),
    "GPU: Llama-2-7B": _gpu(8192, _7B, modes=_NPO),
    "GPU: Phi-1.5, with its bias": _gpu(8192, _PHI, modes=_NPO, bias=True),
    "GPU: Phi-1.5, without": _gpu(8192, _PHI),  # for implementations without a bias
    "GPU: Gemma-2-2B, soft-cap": _gpu(4096, _GEMMA, softcap=30.0),
    # Time and memory against N: small N is bound by launches, large N by memory.
    "GPU: Llama-3.2-1B, 64 rows": _gpu(64, _1B),
    "GPU: Llama-3.2-1B, 256 rows": _gpu(256, _1B),
    "GPU: Llama-3.2-1B, 1024 rows": _gpu(1024, _1B),
    "GPU: Llama-3.2-1B, 32768 rows": _gpu(32768, _1B),
    # Filters and rounding depend on the softmax. The objective decides what an op can compute in its forward call.
    "GPU: Llama-3.2-1B, after unlearning": _gpu(8192, _1B, unlearned=True),
    "GPU: SimNPO": _gpu(8192, _1B, "SimNPO", _FREE),
    "GPU: DPO": _gpu(8192, _1B, "DPO", ("live", "cached")),
    "GPU: NLL": _gpu(8192, _1B, "NLL", ("no reference",)),
    "GPU: GradDiff": _gpu(8192, _1B, "GradDiff", ("no reference",)),
    "GPU: KL retain": _gpu(8192, _1B, KL),
}
# Shapes for ``--check``, which takes seconds: every objective, with bias, soft-cap and after unlearning.
CHECKS = (
    LossShape(64, 64, 512, _FULL, "NPO", _NPO, bias=True),
    LossShape(64, 64, 512, _FULL, "NPO", softcap=30.0),
    LossShape(64, 64, 512, _FULL, "NPO", unlearned=True),
    LossShape(64, 64, 512, _FULL, "SimNPO", _FREE, bias=True),
    LossShape(64, 64, 512, _FULL, "DPO", ("live", "cached"), bias=True),
    LossShape(64, 64, 512, _FULL, "NLL", ("no reference",)),
    LossShape(64, 64, 512, _FULL, "GradDiff", ("no reference",), softcap=30.0, unlearned=True),
    LossShape(64, 64, 512, _FULL, "GradDiff", ("no reference",)),
    LossShape(64, 64, 512, _FULL, KL, bias=True),
    LossShape(64, 64, 512, _HALF, "NPO", _NPO),
)


@dataclass(frozen=True)
class LossInputs:
    """One batch at the head: hidden states and heads of policy and reference, targets, sequences of 32 label rows."""

    objective: str
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,), used for the reference too
    softcap: float | None
    reference_hidden: Tensor  # (N, D)
    reference_weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    row_offsets: RowOffsets
    rule: SequenceRule | None  # None for KL
    reference_sums: Tensor  # (S,)

    def of(self, mode: str) -> "LossInputs":
        """Return the inputs for a mode; a frozen head gets no gradient."""
        if not mode.startswith("frozen"):
            return self
        return replace(self, weight=self.weight.detach(), bias=self.reference_head.bias)

    @property
    def head(self) -> Head:
        """The policy's head."""
        return Head(self.weight, self.bias, self.softcap)

    @property
    def reference_head(self) -> Head:
        """The reference's head, without gradients."""
        return Head(self.reference_weight, None if self.bias is None else self.bias.detach(), self.softcap)

    @property
    def wanted(self) -> list[Tensor]:
        """The tensors that get a gradient."""
        given = (self.hidden, self.weight, self.bias)
        return [each for each in given if each is not None and each.requires_grad]


def make_inputs(shape: LossShape, *, rows: int | None = None, seed: int = 0) -> LossInputs:
    """Return the batch of a shape, or one with fewer rows.

    Rows of the head have length 1, and the noise gives logits of unit variance, so a flat row's logsumexp is log V +
    1/2. Before unlearning, 70 % of the rows are memorised, with p(target) about 0.99: log V + 5.5 times the target's
    row of the head is added to their hidden states. The other rows are flat. After unlearning, retained sequences and
    the reference are the same, but in forget sequences the row of another token is added instead. p(target) is then
    about 1e-7 in those rows, and 1e-5 in flat rows. With a soft-cap, the added multiple is larger by what the cap takes
    away.
    """
    n, d, v, device = rows or shape.n, shape.d, shape.v, shape.device
    g = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    weight = torch.nn.functional.normalize(normal(v, d), dim=1)
    targets = torch.randint(v, (n,), generator=g, device=device)
    others = torch.randint(v, (n,), generator=g, device=device)
    host = torch.arange(0, n + 1, LENGTH)
    own_roles = roles(shape.objective, len(host) - 1).to(device)
    known = (torch.rand(n, 1, generator=g, device=device) < SHARE).float()
    height = torch.log(torch.tensor(float(v))) + 5.5
    if shape.softcap is not None:
        height = shape.softcap * torch.atanh(height / shape.softcap)
    forgotten = (own_roles == FORGET).repeat_interleave(LENGTH) & shape.unlearned
    boost = known * height.to(device)
    reference_weight = torch.nn.functional.normalize(weight + 0.1 * normal(v, d) / d**0.5, dim=1).to(shape.dtype)
    bias = (0.1 * normal(v)).to(shape.dtype).requires_grad_() if shape.bias else None
    reference_sums = torch.full((len(host) - 1,), -LENGTH * 3.0, device=device)
    hidden = normal(n, d) + boost * weight[torch.where(forgotten, others, targets)]
    return LossInputs(
        shape.objective,
        hidden.to(shape.dtype).requires_grad_(),
        weight.to(shape.dtype, copy=True).requires_grad_(),  # a copy: `weight` itself must not require a gradient
        bias,
        shape.softcap,
        (normal(n, d) + boost * weight[targets]).to(shape.dtype),
        reference_weight,
        targets,
        RowOffsets(host, host.to(device)),
        rule(shape.objective, n, own_roles),
        reference_sums,
    )


def gold(inputs: LossInputs, mode: str) -> tuple[Tensor, ...]:
    """Return dh (N, D). Unless the head is frozen, also return dW (V, D) and, with a bias, its gradient (V,)."""
    hidden, weight = inputs.hidden.detach().double(), inputs.weight.detach().double()
    bias = 0.0 if inputs.bias is None else inputs.bias.detach().double()
    cap = inputs.softcap

    def logits(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the capped logits and the cap's derivative."""
        z = h.double() @ w.double().T + bias
        if cap is None:
            return z, torch.ones((), dtype=torch.float64, device=z.device)
        t = torch.tanh(z / cap)
        return cap * t, 1 - t * t

    z, slope = logits(hidden, weight)
    logp = torch.log_softmax(z, 1)
    pick = inputs.targets[:, None]
    if mode == "live":
        reference = torch.log_softmax(logits(inputs.reference_hidden, inputs.reference_weight)[0], 1)
    if inputs.objective == KL:  # d KL(q‖p) / dz = p − q
        dz = (logp.exp() - reference.exp()) / len(z)
    else:
        sums = logp.gather(1, pick).view(-1, LENGTH).sum(1)
        known = reference.gather(1, pick).view(-1, LENGTH).sum(1) if mode == "live" else inputs.reference_sums.double()
        c = _slopes(inputs.objective, sums, known).repeat_interleave(LENGTH)[:, None]  # ∂loss/∂ℓ
        dz = -c * logp.exp()
        dz.scatter_add_(1, pick, c)
    dz = dz * slope
    dh = dz @ weight
    if mode.startswith("frozen"):
        return (dh,)
    dw = dz.T @ hidden
    return (dh, dw) if inputs.bias is None else (dh, dw, dz.sum(0))


def _slopes(objective: str, sums: Tensor, reference: Tensor) -> Tensor:
    """Return ∂loss/∂L of every sequence, (S,)."""
    s = len(sums)
    if objective == "NPO":
        return 2 * torch.sigmoid(BETA * (sums - reference)) / s
    if objective == "SimNPO":
        return 2 * torch.sigmoid(-SIMNPO_BETA * (-sums / LENGTH - SIMNPO_DELTA)) / LENGTH / s
    if objective == "DPO":
        ratio = sums - reference
        half = 2 * torch.sigmoid(-BETA * (ratio[1::2] - ratio[::2])) / (s // 2)
        return torch.stack([half, -half], 1).flatten()
    if objective == "NLL":
        return torch.full_like(sums, -1 / (s * LENGTH))
    if objective == "GradDiff":
        signs = torch.ones_like(sums)
        signs[s // 2 :] = -1
        return signs * 2 / (s * LENGTH)
    raise ValueError(f"`objective`: no fp64 gradients for {objective!r}")
