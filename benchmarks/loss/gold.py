"""Every objective's gradients in fp64, by the chain rule from the logits; nothing of efface, nor torch's autograd."""

import torch
from torch import Tensor

from benchmarks.loss.inputs import LENGTH, LossInputs
from benchmarks.loss.objectives import BETA, KL, SIMNPO_BETA, SIMNPO_DELTA


def gold(inputs: LossInputs, mode: str) -> tuple[Tensor, ...]:
    """Return dh (N, D), and unless the head is frozen dW (V, D) and, where there is one, the bias's (V,)."""
    hidden, weight = inputs.hidden.detach().double(), inputs.weight.detach().double()
    bias = 0.0 if inputs.bias is None else inputs.bias.detach().double()
    cap = inputs.softcap

    def logits(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Capped logits, and the cap's derivative."""
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
    """∂loss/∂L of every sequence (S,)."""
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
    raise ValueError(f"`objective`: no gold for {objective!r}")
