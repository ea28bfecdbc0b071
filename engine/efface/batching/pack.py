"""The packed batch: forget and retain sequences in one flat row of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import efface_native
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from efface.batching.roles import Role
from efface.batching.store import TokenStore

Indices = Sequence[int] | NDArray[np.int64]

_STORES = ("forget", "retain", "alternate")  # in the order of Role


@dataclass(frozen=True)
class PackedBatch:
    """S sequences of T tokens in all, N label rows; what an objective compares stands before what is retained.

    Attributes:
        input_ids: (T,) int64.
        position_ids: (T,) int64, from 0 in each sequence.
        cu_seqlens: (S + 1,) int32; sequence s owns tokens ``cu_seqlens[s]`` .. ``cu_seqlens[s + 1] − 1``.
        label_rows: (N,) int64, the positions whose hidden state predicts a label.
        targets: (N,) int64, those labels.
        roles: (S,) int8, a ``Role`` each.
        sequences: (S,) int64, the index of each sequence in its role's store.
        row_offsets: S + 1 integers on the host: the label rows of each sequence.
        lengths: S integers on the host: the tokens of each sequence.
        forget_sequences: how many of the first sequences are forget or alternate ones.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    label_rows: Tensor
    targets: Tensor
    roles: Tensor
    sequences: Tensor
    row_offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    forget_sequences: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """Return the batch with its tensors on ``device``; what the host plans with stays on the host."""
        names = ("input_ids", "position_ids", "cu_seqlens", "label_rows", "targets", "roles", "sequences")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names})

    def forget_part(self) -> "PackedBatch":
        """Return the forget (and alternate) sequences alone, as views: what a live reference model has to read."""
        count = self.forget_sequences
        tokens, rows = sum(self.lengths[:count]), self.row_offsets[count]
        return PackedBatch(
            input_ids=self.input_ids[:tokens],
            position_ids=self.position_ids[:tokens],
            cu_seqlens=self.cu_seqlens[: count + 1],
            label_rows=self.label_rows[:rows],
            targets=self.targets[:rows],
            roles=self.roles[:count],
            sequences=self.sequences[:count],
            row_offsets=self.row_offsets[: count + 1],
            lengths=self.lengths[:count],
            forget_sequences=count,
        )


def pack_items(
    stores: Sequence[TokenStore], roles: NDArray[np.int8], sequences: NDArray[np.int64], *, pin_memory: bool = False
) -> PackedBatch:
    """Assemble sequences into one packed batch, in the order in which they are given.

    Args:
        stores: the forget, the retain and, where there are any, the alternate store.
        roles: (S,) int8, a ``Role`` each; forget and alternate ones first.
        sequences: (S,) int64, indices into the store of the role.
        pin_memory: put the tensors where an accelerator copies from without waiting.

    Raises:
        ValueError: an index out of range, a role without a store, a sequence without a label.
    """
    native = [store.native(name) for store, name in zip(stores, _STORES, strict=False)]
    count, tokens, rows = efface_native.measure(native, roles, sequences)

    def empty(size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=pin_memory)

    tensors = {
        "input_ids": empty(tokens),
        "position_ids": empty(tokens),
        "cu_seqlens": empty(count + 1, torch.int32),
        "label_rows": empty(rows),
        "targets": empty(rows),
    }
    buffers = {name: tensor.numpy() for name, tensor in tensors.items()}
    row_offsets = np.empty(count + 1, np.int64)
    efface_native.pack(native, roles, sequences, **buffers, row_offsets=row_offsets)
    tensors["roles"], tensors["sequences"] = empty(count, torch.int8), empty(count)
    tensors["roles"].numpy()[:] = roles
    tensors["sequences"].numpy()[:] = sequences
    return PackedBatch(
        **tensors,
        row_offsets=tuple(row_offsets.tolist()),
        lengths=tuple(np.diff(buffers["cu_seqlens"]).tolist()),
        forget_sequences=int(np.count_nonzero(roles != Role.RETAIN)),
    )


def pack(forget: TokenStore, retain: TokenStore, forget_index: Indices, retain_index: Indices) -> PackedBatch:
    """Assemble the chosen forget and retain sequences into one packed batch on the CPU.

    Raises:
        ValueError: an index out of range, a sequence without a label, an inconsistent store.
    """
    sequences = np.concatenate([np.asarray(forget_index, np.int64), np.asarray(retain_index, np.int64)])
    roles = np.repeat(np.array([Role.FORGET, Role.RETAIN], np.int8), [len(forget_index), len(retain_index)])
    return pack_items((forget, retain), roles, sequences)
