"""The packed batch: forget and retain sequences in one flat row of tokens."""

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
    """S sequences of T tokens in all, N label rows; what an objective compares stands before what is retained.

    All tensors are views of one piece of memory, so that one copy brings a batch to a device.

    Attributes:
        storage: int64 words, divided up as the C++ packer does (csrc/packer.hpp, ``PackedParts``).
        layout: (S, T, N) of the storage.
        lengths: S integers on the host: the tokens of each sequence.
        row_offsets: S + 1 integers on the host: the label rows of each sequence.
        forget_sequences: how many of the first sequences are forget or alternate ones.
    """

    storage: Tensor
    layout: tuple[int, int, int]
    lengths: tuple[int, ...]
    row_offsets: tuple[int, ...]
    forget_sequences: int

    @cached_property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @cached_property
    def input_ids(self) -> Tensor:
        """(T,) int64."""
        return self.storage[: self.tokens]

    @cached_property
    def position_ids(self) -> Tensor:
        """(T,) int64, from 0 in each sequence."""
        _, t, _ = self.layout
        return self.storage[t : t + self.tokens]

    @cached_property
    def label_rows(self) -> Tensor:
        """(N,) int64, the positions whose hidden state predicts a label."""
        _, t, _ = self.layout
        return self.storage[2 * t : 2 * t + self.row_offsets[-1]]

    @cached_property
    def targets(self) -> Tensor:
        """(N,) int64, those labels."""
        _, t, n = self.layout
        return self.storage[2 * t + n : 2 * t + n + self.row_offsets[-1]]

    @cached_property
    def sequences(self) -> Tensor:
        """(S,) int64, the index of each sequence in its role's store."""
        _, t, n = self.layout
        return self.storage[2 * (t + n) : 2 * (t + n) + len(self.lengths)]

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(S + 1,) int32; sequence s owns tokens ``cu_seqlens[s]`` .. ``cu_seqlens[s + 1] − 1``."""
        s, t, n = self.layout
        words = self.storage[2 * (t + n) + s : 2 * (t + n) + s + (s + 2) // 2]
        return words.view(torch.int32)[: len(self.lengths) + 1]

    @cached_property
    def roles(self) -> Tensor:
        """(S,) int8, a ``Role`` each."""
        s, _, _ = self.layout
        return self.storage[-((s + 7) // 8) or len(self.storage) :].view(torch.int8)[: len(self.lengths)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """Return the batch with its tensors on ``device``; what the host plans with stays on the host."""
        storage = self.storage.to(device, non_blocking=non_blocking)
        return self if storage is self.storage else replace(self, storage=storage)

    @cached_property
    def label_offsets(self) -> RowOffsets:
        """``row_offsets`` in both places, copied once for all who sum over sequences."""
        host = torch.tensor(self.row_offsets, dtype=torch.int64)
        return RowOffsets(host, to_device(host, self.storage.device))

    @property
    def forget_rows(self) -> int:
        """Label rows of the forget (and alternate) sequences, the first of all."""
        return self.row_offsets[self.forget_sequences]

    def forget_part(self) -> "PackedBatch":
        """Return the forget (and alternate) sequences alone, as views."""
        count = self.forget_sequences
        return replace(self, lengths=self.lengths[:count], row_offsets=self.row_offsets[: count + 1])

    def retain_part(self) -> "PackedBatch":
        """Return the sequences after the forget ones alone, as a copy."""
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
        """Lay tensors out as the C++ packer does; what they are is described above."""
        words = [_words(part) for part in (cu_seqlens, roles)]
        storage = torch.cat([input_ids, position_ids, label_rows, targets, sequences, *words])
        return cls(storage, (len(lengths), len(input_ids), len(targets)), lengths, row_offsets, forget_sequences)


def _words(part: Tensor) -> Tensor:
    """Return a vector of a smaller type as the int64 words that hold it."""
    per_word = 8 // part.element_size()
    return torch.nn.functional.pad(part, (0, -len(part) % per_word)).view(torch.int64)


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
    size = efface_native.measure(native, roles, sequences)
    storage = torch.empty(size[3], dtype=torch.int64, pin_memory=pin_memory)
    packed = efface_native.pack(native, roles, sequences, storage.numpy())
    return PackedBatch(storage, size[:3], *packed)


def pack(forget: TokenStore, retain: TokenStore, forget_index: Indices, retain_index: Indices) -> PackedBatch:
    """Assemble the chosen forget and retain sequences into one packed batch on the CPU.

    Raises:
        ValueError: an index out of range, a sequence without a label, an inconsistent store.
    """
    sequences = np.concatenate([np.asarray(forget_index, np.int64), np.asarray(retain_index, np.int64)])
    roles = np.repeat(np.array([Role.FORGET, Role.RETAIN], np.int8), [len(forget_index), len(retain_index)])
    return pack_items((forget, retain), roles, sequences)
