"""The sequence loss in plain PyTorch: the readable truth, and the implementation for any device.

Coefficients are written down, not left to autograd: they are the formulas that the kernel is checked against, and
autograd cannot be used within a custom op.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from efface_kernels.sequence_loss.kinds import Kind
from efface_kernels.sequences import Sequences

Pair = tuple[Tensor, Tensor]  # terms (s,), and c = ∂Σterms/∂ℓ (n,)


@dataclass(frozen=True)
class _Batch:
    """What the formulas below read. Each sequence has the parameters of its role, (s,)."""

    sequences: Sequences
    kind: Tensor
    weight: Tensor
    beta: Tensor
    delta: Tensor
    beta1: Tensor
    beta2: Tensor
    ignored: Tensor

    @property
    def rewards(self) -> Tensor:
        """L − L_ref."""
        reference = self.sequences.reference_sums
        if reference is None:
            raise ValueError(
                "NPO and DPO need the reference model's sequence log-probabilities, got none; give a live or cached "
                "reference"
            )
        return self.sequences.sums - reference

    def linear(self, slope: float) -> Pair:
        """Slope · L."""
        weight = slope * self.weight
        return weight * self.sequences.sums, self.sequences.of_rows(weight)

    def preference(self, x: Tensor, slope: Tensor) -> Pair:
        """−(2/β) log σ(x) and its derivative by L, both (s,), where ``slope`` = ∂x/∂L."""
        scale = 2 * self.weight / self.beta
        return -scale * logsigmoid(x), -scale * torch.sigmoid(-x) * slope

    def weighted(self, weight: Tensor) -> Pair:
        """Σ weight · ℓ with a constant weight a row, (n,)."""
        sequences = self.sequences
        return self.weight * sequences.sums_of(weight * sequences.logprobs), sequences.of_rows(self.weight) * weight


def _npo(batch: _Batch) -> Pair:
    terms, c = batch.preference(-batch.beta * batch.rewards, -batch.beta)
    return terms, batch.sequences.of_rows(c)


def _simnpo(batch: _Batch) -> Pair:
    slope = -batch.beta / batch.sequences.lengths
    terms, c = batch.preference(slope * batch.sequences.sums - batch.beta * batch.delta, slope)
    return terms, batch.sequences.of_rows(c)


def _first_of_pair(batch: _Batch) -> Pair:
    """DPO's term and its derivative by L of the first, (s,); that by L' of the second is the negative."""
    margin = batch.sequences.following(batch.rewards) - batch.rewards
    terms, c = batch.preference(batch.beta * margin, -batch.beta)
    # The last sequence has none that follows: NaN, should it claim to be the first of a pair.
    last = torch.arange(len(terms), device=terms.device) == len(terms) - 1
    return torch.where(last, torch.nan, terms), torch.where(last, torch.nan, c)


def _dpo(batch: _Batch) -> Pair:
    terms, c = _first_of_pair(batch)
    return terms, batch.sequences.of_rows(c)


def _alternate(batch: _Batch) -> Pair:
    _, c = _first_of_pair(batch)
    first = torch.where(batch.kind == Kind.DPO, c, 0).roll(1)
    first[:1] = 0  # what rolled over the edge
    return torch.zeros_like(c), batch.sequences.of_rows(-first)


def _wga(batch: _Batch) -> Pair:
    return batch.weighted(torch.exp(batch.sequences.of_rows(batch.beta) * batch.sequences.logprobs))


def _satimp(batch: _Batch) -> Pair:
    logprobs, beta1, beta2 = (batch.sequences.logprobs, *map(batch.sequences.of_rows, (batch.beta1, batch.beta2)))
    # 1 − p as −expm1(ℓ): of memorised tokens the difference would keep no digit
    return batch.weighted(torch.exp(beta1 * logprobs) * (-torch.expm1(logprobs)) ** beta2)


def _ceu(batch: _Batch) -> Pair:
    """−Σ log(1 − p), c = p / (1 − p); a target q, the model's softmax without the true token, detached.

    The cross entropy to q is −log(1 − p) + H(q), and its gradient p − q that of −log(1 − p) with a live p. ℓ near 0 is
    known to eps, so that 1 − p may be 0: with eps added c stays finite, and c (softmax − onehot) below about 1.
    """
    sequences = batch.sequences
    rest = torch.finfo(sequences.logprobs.dtype).eps - torch.expm1(sequences.logprobs)
    counted = sequences.places >= sequences.of_rows(batch.ignored)
    terms = batch.weight * sequences.sums_of(torch.where(counted, -torch.log(rest), 0))
    return terms, torch.where(counted, sequences.of_rows(batch.weight) * torch.exp(sequences.logprobs) / rest, 0)


_FORMULAS: dict[int, Callable[[_Batch], Pair]] = {
    Kind.NLL: lambda batch: batch.linear(-1.0),
    Kind.ASCENT: lambda batch: batch.linear(1.0),
    Kind.NPO: _npo,
    Kind.SIMNPO: _simnpo,
    Kind.DPO: _dpo,
    Kind.ALTERNATE: _alternate,
    Kind.WGA: _wga,
    Kind.SATIMP: _satimp,
    Kind.CEU: _ceu,
}


@torch.no_grad()
def sequence_terms(sequences: Sequences, roles: Tensor, table: Tensor, kinds: Sequence[int]) -> Pair:
    """Return the weighted terms (s,) and c (n,): row ``roles[i]`` of ``table`` says which formula sequence i has.

    Args:
        sequences: s whole sequences, offsets from 0.
        roles: (s,) rows of the table.
        table: (R, 7), see ``Term``.
        kinds: those that occur in the table, so that no other is computed.
    """
    batch = _Batch(sequences, *table.to(sequences.logprobs.dtype)[roles.long()].unbind(1))
    terms, coefficients = torch.zeros_like(batch.weight), torch.zeros_like(sequences.logprobs)
    row_kind = sequences.of_rows(batch.kind)
    for kind in kinds:
        if kind in _FORMULAS:
            some_terms, some_coefficients = _FORMULAS[kind](batch)
            terms = torch.where(batch.kind == kind, some_terms.to(terms.dtype), terms)
            coefficients = torch.where(row_kind == kind, some_coefficients.to(terms.dtype), coefficients)
    return terms, coefficients
