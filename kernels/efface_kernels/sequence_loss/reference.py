"""The loss terms of a batch in plain PyTorch: the readable truth. Coefficients are autograd's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from efface_kernels.sequence_loss.kinds import NEED_REFERENCE, Kind

if TYPE_CHECKING:
    from efface_kernels.linear_loss.sequences import Sequences


@dataclass(frozen=True)
class _Batch:
    """What the terms below are made of; each sequence has the parameters of its role."""

    sequences: Sequences
    beta: Tensor  # (s,), as are the other parameters
    delta: Tensor
    beta1: Tensor
    beta2: Tensor
    ignored: Tensor

    @property
    def sums(self) -> Tensor:
        return self.sequences.sums  # (s,)

    @property
    def rewards(self) -> Tensor:
        """(s,) L − L_ref."""
        reference = self.sequences.reference_sums
        assert reference is not None  # noqa: S101 - sequence_terms asked
        return self.sums - reference

    @property
    def probabilities(self) -> tuple[Tensor, Tensor]:
        """(n,) p and 1 − p, constants."""
        logprobs = self.sequences.logprobs.detach()
        return torch.exp(logprobs), -torch.expm1(logprobs)

    def each_row(self, values: Tensor) -> Tensor:
        """Repeat one value a sequence, (s,), for its rows, (n,)."""
        lengths = self.sequences.row_offsets.diff()
        return values.repeat_interleave(lengths, output_size=self.sequences.logprobs.shape[0])


def _preference(margin: Tensor, beta: Tensor) -> Tensor:
    """−(2/β) log σ(β · margin)."""
    beta = torch.where(beta > 0, beta, 1)  # sequences of another kind: an infinity would make their gradient NaN
    return -2 / beta * logsigmoid(beta * margin)


def _dpo(batch: _Batch) -> Tensor:
    terms = _preference(batch.sequences.following(batch.rewards) - batch.rewards, batch.beta)
    # The last sequence has none that follows: NaN, should it claim to be the first of a pair.
    last = torch.arange(len(terms), device=terms.device) == len(terms) - 1
    return torch.where(last, torch.nan, terms)


def _wga(batch: _Batch) -> Tensor:
    weight = torch.exp(batch.each_row(batch.beta) * batch.sequences.logprobs.detach())
    return batch.sequences.sums_of(weight * batch.sequences.logprobs)


def _satimp(batch: _Batch) -> Tensor:
    p, rest = batch.probabilities
    weight = p.pow(batch.each_row(batch.beta1)) * rest.pow(batch.each_row(batch.beta2))
    return batch.sequences.sums_of(weight * batch.sequences.logprobs)


def _ceu(batch: _Batch) -> Tensor:
    """−Σ log(1 − p), and −p / (1 − p) for its derivative. 1 − p is at least eps: p → 1 would be an infinite step."""
    logprobs, offsets = batch.sequences.logprobs, batch.sequences.row_offsets
    p, rest = batch.probabilities
    rest = rest.clamp(min=torch.finfo(rest.dtype).eps)
    # The derivative is written down, because clamp's own is 0 where it acts.
    token = -torch.log(rest) + p / rest * (logprobs - logprobs.detach())
    place = torch.arange(len(logprobs), device=logprobs.device) - batch.each_row(offsets[:-1])
    return batch.sequences.sums_of(torch.where(place < batch.each_row(batch.ignored), 0, token))


_TERMS: dict[int, Callable[[_Batch], Tensor]] = {
    Kind.NLL: lambda batch: -batch.sums,
    Kind.ASCENT: lambda batch: batch.sums,
    Kind.NPO: lambda batch: _preference(-batch.rewards, batch.beta),
    Kind.SIMNPO: lambda batch: _preference(-batch.sums / batch.sequences.lengths - batch.delta, batch.beta),
    Kind.DPO: _dpo,
    Kind.WGA: _wga,
    Kind.SATIMP: _satimp,
    Kind.CEU: _ceu,
}


def sequence_terms(sequences: Sequences, roles: Tensor, table: Tensor, kinds: Sequence[int]) -> Tensor:
    """Return the weighted terms (s,): row ``roles[i]`` of ``table`` says which formula sequence i has.

    Args:
        sequences: s whole sequences.
        roles: (s,) rows of the table.
        table: (R, 7), see ``Term``.
        kinds: those that occur in the table, so that no other is computed.
    """
    if sequences.reference_sums is None and not NEED_REFERENCE.isdisjoint(kinds):
        raise ValueError(
            "NPO and DPO need the reference model's sequence log-probabilities, got none; give a live or cached reference"
        )
    kind, weight, *parameters = table.to(sequences.logprobs.dtype)[roles.long()].unbind(1)  # (s,) each
    batch = _Batch(sequences, *parameters)
    terms = torch.zeros_like(weight)
    for each in kinds:
        if each in _TERMS:
            terms = torch.where(kind == each, _TERMS[each](batch), terms)
    return weight * terms
