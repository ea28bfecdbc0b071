"""Packed batches: forget and retain sequences concatenated into one row of tokens, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import efface_native
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from efface.batching.plan import Role
from efface.batching.store import TokenStore
from efface_kernels import RowOffsets, to_device

Indices = Sequence[int] | NDArray[np.int64]

_STORES = ("forget", "retain", "alternate")  # in the order of Role


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """S sequences with T tokens and N label rows in total; forget and alternate sequences come before retain ones.

    All tensors are views of one buffer, so a single copy moves a batch to a device.

    Attributes:
        storage: the buffer of int64 words, laid out by the C++ packer (csrc/packer.hpp, ``PackedParts``).
        layout: S, T and N of the whole buffer, which a ``forget_part`` shares with the batch that it was taken from.
        lengths: S integers on the host, number of tokens of each sequence.
        row_offsets: S + 1 integers on the host, start of each sequence's label rows; the last entry is N.
        forget_sequences: number of forget and alternate sequences, which come first.
    """

    storage: Tensor
    layout: tuple[int, int, int]
    lengths: tuple[int, ...]
    row_offsets: tuple[int, ...]
    forget_sequences: int

    @cached_property
    def tokens(self) -> int:
        """T, the number of tokens."""
        return sum(self.lengths)

    @cached_property
    def input_ids(self) -> Tensor:
        """(T,) int64 token ids."""
        return self.storage[: self.tokens]

    @cached_property
    def position_ids(self) -> Tensor:
        """(T,) int64 positions, counted from 0 in each sequence."""
        _, t, _ = self.layout
        return self.storage[t : t + self.tokens]

    @cached_property
    def label_rows(self) -> Tensor:
        """(N,) int64 indices of the tokens whose hidden states predict a label."""
        _, t, _ = self.layout
        return self.storage[2 * t : 2 * t + self.row_offsets[-1]]

    @cached_property
    def targets(self) -> Tensor:
        """(N,) int64 labels that the label rows predict."""
        _, t, n = self.layout
        return self.storage[2 * t + n : 2 * t + n + self.row_offsets[-1]]

    @cached_property
    def sequences(self) -> Tensor:
        """(S,) int64 index of each sequence in the store of its role."""
        _, t, n = self.layout
        return self.storage[2 * (t + n) : 2 * (t + n) + len(self.lengths)]

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(S + 1,) int32; sequence s consists of tokens ``cu_seqlens[s]`` .. ``cu_seqlens[s + 1] − 1``."""
        s, t, n = self.layout
        words = self.storage[2 * (t + n) + s : 2 * (t + n) + s + (s + 2) // 2]
        return words.view(torch.int32)[: len(self.lengths) + 1]

    @cached_property
    def roles(self) -> Tensor:
        """(S,) int8 ``Role`` of each sequence."""
        s, _, _ = self.layout
        return self.storage[-((s + 7) // 8) or len(self.storage) :].view(torch.int8)[: len(self.lengths)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """Return the batch with its tensors on ``device``; ``lengths`` and ``row_offsets`` stay on the host."""
        storage = self.storage.to(device, non_blocking=non_blocking)
        return self if storage is self.storage else replace(self, storage=storage)

    @cached_property
    def label_offsets(self) -> RowOffsets:
        """``row_offsets`` on the host and on the device, copied once for all sums over sequences."""
        host = torch.tensor(self.row_offsets, dtype=torch.int64)
        return RowOffsets(host, to_device(host, self.storage.device))

    @property
    def forget_rows(self) -> int:
        """Number of label rows of the forget and alternate sequences, which come first."""
        return self.row_offsets[self.forget_sequences]

    def forget_part(self) -> "PackedBatch":
        """Return a batch of only the forget and alternate sequences, as views of this one."""
        count = self.forget_sequences
        return replace(self, lengths=self.lengths[:count], row_offsets=self.row_offsets[: count + 1])

    def retain_part(self) -> "PackedBatch":
        """Return a batch of only the sequences after the forget and alternate ones, as a copy."""
        first, rows = self.forget_sequences, self.forget_rows
        tokens = sum(self.lengths[:first])
        return PackedBatch.of(
            input_ids=self.input_ids[tokens:],
            position_ids=self.position_ids[tokens:],
            label_rows=self.label_rows[rows:] - tokens,
            targets=self.targets[rows:],
            sequences=self.sequences[first:],
            cu_seqlens=self.cu_seqlens[first:] - tokens,
            roles=self.roles[first:],
            lengths=self.lengths[first:],
            row_offsets=tuple(offset - rows for offset in self.row_offsets[first:]),
        )

    @classmethod
    def of(
        cls,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        label_rows: Tensor,
        targets: Tensor,
        sequences: Tensor,
        cu_seqlens: Tensor,
        roles: Tensor,
        lengths: tuple[int, ...],
        row_offsets: tuple[int, ...],
        forget_sequences: int = 0,
    ) -> "PackedBatch":
        """Copy tensors into one buffer in the C++ packer's layout; the arguments are the attributes of this class."""
        words = [_words(part) for part in (cu_seqlens, roles)]
        storage = torch.cat([input_ids, position_ids, label_rows, targets, sequences, *words])
        return cls(storage, (len(lengths), len(input_ids), len(targets)), lengths, row_offsets, forget_sequences)


def _words(part: Tensor) -> Tensor:
    """Return a vector of a smaller dtype viewed as int64 words, padded with zeros to whole words."""
    per_word = 8 // part.element_size()
    return torch.nn.functional.pad(part, (0, -len(part) % per_word)).view(torch.int64)


def pack_items(
    stores: Sequence[TokenStore], roles: NDArray[np.int8], sequences: NDArray[np.int64], *, pin_memory: bool = False
) -> PackedBatch:
    """Assemble sequences into one packed batch on the CPU, in the given order.

    Args:
        stores: the forget store, the retain store and, if alternate answers are used, the alternate store.
        roles: (S,) int8, ``Role`` of each sequence; forget and alternate sequences come first.
        sequences: (S,) int64, index of each sequence in the store of its role.
        pin_memory: allocate pinned memory, from which an accelerator can copy asynchronously.

    Raises:
        ValueError: if an index is out of range, a role has no store, or a sequence has no label.
    """
    native = [store.native(name) for store, name in zip(stores, _STORES, strict=False)]
    size = efface_native.measure(native, roles, sequences)
    storage = torch.empty(size[3], dtype=torch.int64, pin_memory=pin_memory)
    packed = efface_native.pack(native, roles, sequences, storage.numpy())
    return PackedBatch(storage, size[:3], *packed)


def pack(forget: TokenStore, retain: TokenStore, forget_index: Indices, retain_index: Indices) -> PackedBatch:
    """Assemble the chosen forget and retain sequences into one packed batch on the CPU.

    Args:
        forget: the forget store.
        retain: the retain store.
        forget_index: indices of sequences in the forget store.
        retain_index: indices of sequences in the retain store.

    Raises:
        ValueError: if an index is out of range, a sequence has no label, or a store is inconsistent.
    """
    sequences = np.concatenate([np.asarray(forget_index, np.int64), np.asarray(retain_index, np.int64)])
    roles = np.repeat(np.array([Role.FORGET, Role.RETAIN], np.int8), [len(forget_index), len(retain_index)])
    return pack_items((forget, retain), roles, sequences)
