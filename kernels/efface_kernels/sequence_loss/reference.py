"""The sequence loss in plain PyTorch: the readable reference implementation, which runs on any device.

The coefficients are explicit formulas and not derived by autograd, for two reasons: the Triton kernel is tested against
them, and autograd cannot be used within a custom op.
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
    """Input of the formulas below: the sequences, and the parameters of each sequence's role, (s,)."""

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
                "NPO and DPO need the reference model's sequence log-probabilities, got none; pass a live or cached "
                "reference"
            )
        return self.sequences.sums - reference

    def linear(self, slope: float) -> Pair:
        """Return the terms slope · L, and their coefficients."""
        weight = slope * self.weight
        return weight * self.sequences.sums, self.sequences.of_rows(weight)

    def preference(self, x: Tensor, slope: Tensor) -> Pair:
        """Return −(2/β) log σ(x) and its derivative with respect to L, both (s,); ``slope`` is ∂x/∂L."""
        scale = 2 * self.weight / self.beta
        return -scale * logsigmoid(x), -scale * torch.sigmoid(-x) * slope

    def weighted(self, weight: Tensor) -> Pair:
        """Return the terms Σ weight · ℓ, where the weights of the rows, (n,), are constants, and their coefficients."""
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
    """Return DPO's term and its derivative with respect to L of the pair's first sequence, (s,).

    The derivative with respect to L' of the second sequence is the negative.
    """
    margin = batch.sequences.following(batch.rewards) - batch.rewards
    terms, c = batch.preference(batch.beta * margin, -batch.beta)
    # No sequence follows the last one: NaN if its kind says that it is the first of a pair.
    last = torch.arange(len(terms), device=terms.device) == len(terms) - 1
    return torch.where(last, torch.nan, terms), torch.where(last, torch.nan, c)


def _dpo(batch: _Batch) -> Pair:
    terms, c = _first_of_pair(batch)
    return terms, batch.sequences.of_rows(c)


def _alternate(batch: _Batch) -> Pair:
    _, c = _first_of_pair(batch)
    first = torch.where(batch.kind == Kind.DPO, c, 0).roll(1)
    first[:1] = 0  # the value that roll() moved from the end to the start
    return torch.zeros_like(c), batch.sequences.of_rows(-first)


def _wga(batch: _Batch) -> Pair:
    return batch.weighted(torch.exp(batch.sequences.of_rows(batch.beta) * batch.sequences.logprobs))


def _satimp(batch: _Batch) -> Pair:
    logprobs, beta1, beta2 = (batch.sequences.logprobs, *map(batch.sequences.of_rows, (batch.beta1, batch.beta2)))
    # 1 − p as −expm1(ℓ), because 1 − p of memorised tokens would lose all digits
    return batch.weighted(torch.exp(beta1 * logprobs) * (-torch.expm1(logprobs)) ** beta2)


def _ceu(batch: _Batch) -> Pair:
    """Return the terms −Σ log(1 − p) and c = p / (1 − p).

    CE-U's target q is the model's softmax without the true token, detached. The cross entropy to q is −log(1 − p) +
    H(q), and its gradient, softmax − q, equals that of −log(1 − p). ℓ near 0 has an absolute error of eps, so 1 − p can
    be 0. Adding eps to it keeps c finite, and c · (softmax − onehot) below about 1.
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
    """Return the weighted terms (s,) and c (n,); row ``roles[i]`` of ``table`` defines the term of sequence i.

    Args:
        sequences: s whole sequences with offsets from 0.
        roles: (s,) row indices into the table.
        table: (R, 7), one ``Term`` per row.
        kinds: kinds that occur in the table; formulas of other kinds are not evaluated.
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
