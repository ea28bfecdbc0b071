"""Packed batches: forget and retain sequences in one row of tokens, without padding and without repeated prefixes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

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


class PackedLayout(NamedTuple):
    """Sizes of the parts of a batch's storage, see csrc/packer.hpp, ``PackedParts``."""

    sequences: int  # S
    tokens: int  # T
    rows: int  # N
    paths: int  # E, or 0 if no tokens are shared

    @property
    def path_tokens(self) -> int:
        """E, the tokens that would be stored if none were shared."""
        return self.paths or self.tokens

    def starts(self) -> list[int]:
        """Return the first word of each part, and the number of words."""
        s, t, n, e = self
        words = [t, t, n, n, s, (s + 2) // 2, (s + 7) // 8, (e + 1) // 2, (s + 2) // 2 if e else 0]
        return list(accumulate(words, initial=0))


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """S sequences with N label rows, stored as T tokens; forget and alternate sequences come before retain ones.

    The batch is a *token tree*: tokens that a sequence shares with an earlier sequence, from the first token on, are
    stored once. The *segment* of a sequence consists of the tokens that it does not share with earlier sequences; it
    has at least one token. The *path* of a sequence is the list of all its tokens, in its own and in earlier segments.
    A token attends to the tokens before it on its path, so its hidden state is the same as in a pass of the sequence
    alone. A batch in which nothing is shared consists of one segment per sequence and has no paths.

    All tensors are views of one buffer, so a single copy moves a batch to a device.

    Attributes:
        storage: the buffer of int64 words, laid out by the C++ packer (csrc/packer.hpp, ``PackedParts``).
        layout: sizes of the whole buffer, which a ``forget_part`` shares with the batch that it was taken from.
        lengths: S integers on the host, number of tokens of each sequence, whether shared or not.
        segment_lengths: S integers on the host, number of tokens stored for each sequence; their sum is T.
        row_offsets: S + 1 integers on the host, start of each sequence's label rows; the last entry is N.
        forget_sequences: number of forget and alternate sequences, which come first.
        last_tokens: whether the last token of each sequence, which predicts nothing, is included in its path.
        host: the batch on the CPU that this one was copied from, or None.
    """

    storage: Tensor
    layout: PackedLayout
    lengths: tuple[int, ...]
    segment_lengths: tuple[int, ...]
    row_offsets: tuple[int, ...]
    forget_sequences: int
    last_tokens: bool = True
    host: "PackedBatch | None" = None

    @cached_property
    def tokens(self) -> int:
        """T, the number of stored tokens, which a forward pass runs."""
        return sum(self.segment_lengths)

    @cached_property
    def sequence_tokens(self) -> int:
        """The number of tokens of all sequences, with shared tokens counted for each of them."""
        return sum(self.lengths)

    @cached_property
    def path_lengths(self) -> tuple[int, ...]:
        """S integers on the host, number of tokens on each sequence's path; their sum is E."""
        return self.lengths if self.last_tokens else tuple(length - 1 for length in self.lengths)

    @property
    def shared(self) -> bool:
        """Whether sequences share tokens, so that the attention must read keys along ``paths``."""
        return self.segment_lengths != self.path_lengths

    @cached_property
    def _starts(self) -> list[int]:
        return self.layout.starts()

    @cached_property
    def input_ids(self) -> Tensor:
        """(T,) int64 token ids."""
        return self.storage[: self.tokens]

    @cached_property
    def position_ids(self) -> Tensor:
        """(T,) int64 positions, counted from 0 along the path."""
        start = self._starts[1]
        return self.storage[start : start + self.tokens]

    @cached_property
    def label_rows(self) -> Tensor:
        """(N,) int64 indices of the tokens whose hidden states predict a label, for each sequence in turn.

        A token that predicts labels of several sequences occurs once for each of them.
        """
        start = self._starts[2]
        return self.storage[start : start + self.row_offsets[-1]]

    @cached_property
    def targets(self) -> Tensor:
        """(N,) int64 labels that the label rows predict."""
        start = self._starts[3]
        return self.storage[start : start + self.row_offsets[-1]]

    @cached_property
    def sequences(self) -> Tensor:
        """(S,) int64 index of each sequence in the store of its role."""
        start = self._starts[4]
        return self.storage[start : start + len(self.lengths)]

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(S + 1,) int32; the segment of sequence s is tokens ``cu_seqlens[s]`` .. ``cu_seqlens[s + 1] − 1``."""
        return self._part(5, torch.int32)[: len(self.lengths) + 1]

    @cached_property
    def roles(self) -> Tensor:
        """(S,) int8 ``Role`` of each sequence."""
        return self._part(6, torch.int8)[: len(self.lengths)]

    @cached_property
    def paths(self) -> Tensor:
        """(E,) int32 indices of the tokens on each sequence's path, for each sequence in turn; (0,) without sharing."""
        return self._part(7, torch.int32)[: sum(self.path_lengths) if self.shared else 0]

    @cached_property
    def cu_paths(self) -> Tensor:
        """(S + 1,) int32; the path of sequence s is ``paths[cu_paths[s]:cu_paths[s + 1]]``; (0,) without sharing."""
        return self._part(8, torch.int32)[: len(self.lengths) + 1 if self.shared else 0]

    def _part(self, part: int, dtype: torch.dtype) -> Tensor:
        return self.storage[self._starts[part] : self._starts[part + 1]].view(dtype)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """Return the batch with its tensors on ``device``; all tuples stay on the host."""
        storage = self.storage.to(device, non_blocking=non_blocking)
        if storage is self.storage:
            return self
        return replace(self, storage=storage, host=self if self.storage.device.type == "cpu" else self.host)

    def _on_host(self) -> "PackedBatch":
        """Return the batch on the CPU, without a copy from the device if the batch was made on the CPU."""
        return self.to("cpu") if self.host is None else self.host

    def _moved_here(self, batch: "PackedBatch") -> "PackedBatch":
        """Return a batch from the CPU on this batch's device, without waiting for the device."""
        storage = to_device(batch.storage, self.storage.device)
        return batch if storage is batch.storage else replace(batch, storage=storage, host=batch)

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
        return replace(
            self,
            lengths=self.lengths[:count],
            segment_lengths=self.segment_lengths[:count],
            row_offsets=self.row_offsets[: count + 1],
            host=None if self.host is None else self.host.forget_part(),
        )

    def retain_part(self) -> "PackedBatch":
        """Return a batch of only the sequences after the forget and alternate ones, as a copy."""
        return self._retain_part

    @cached_property
    def _retain_part(self) -> "PackedBatch":
        first, rows = self.forget_sequences, self.forget_rows
        if self.shared:
            return self._moved_here(_retain_tree(self._on_host()))
        tokens = sum(self.segment_lengths[:first])
        return PackedBatch.of(
            input_ids=self.input_ids[tokens:],
            position_ids=self.position_ids[tokens:],
            label_rows=self.label_rows[rows:] - tokens,
            cu_seqlens=self.cu_seqlens[first:] - tokens,
            **_retain_sequences(self),
        )

    def unshared(self) -> "PackedBatch":
        """Return a batch of the same sequences that stores all tokens of each sequence, its last token included."""
        if not self.lengths:  # a part without sequences
            return replace(self, last_tokens=True)
        return self._unshared if self.shared or not self.last_tokens else self

    @cached_property
    def _unshared(self) -> "PackedBatch":
        batch = self._on_host()
        ends = torch.tensor(batch.lengths).cumsum(0)
        starts = ends - torch.tensor(batch.lengths)
        ids = torch.empty(batch.sequence_tokens, dtype=torch.int64)
        inner = torch.ones(batch.sequence_tokens, dtype=torch.bool)
        if not batch.last_tokens:
            inner[ends - 1] = False
            ids[ends - 1] = batch.targets[batch.label_offsets.host[1:] - 1]  # the last label is the last token
        ids[inner] = batch.input_ids[batch.paths.long()] if batch.shared else batch.input_ids
        of_rows = starts.repeat_interleave(batch.label_offsets.host.diff())
        unshared = PackedBatch.of(
            input_ids=ids,
            position_ids=torch.cat([torch.arange(length) for length in batch.lengths]),
            label_rows=of_rows + batch.position_ids[batch.label_rows],
            targets=batch.targets,
            sequences=batch.sequences,
            cu_seqlens=torch.nn.functional.pad(ends, (1, 0)).int(),
            roles=batch.roles,
            lengths=batch.lengths,
            row_offsets=batch.row_offsets,
            forget_sequences=batch.forget_sequences,
        )
        return self._moved_here(unshared)

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
        segment_lengths: tuple[int, ...] | None = None,
        paths: Tensor | None = None,
        cu_paths: Tensor | None = None,
        forget_sequences: int = 0,
        last_tokens: bool = True,
    ) -> "PackedBatch":
        """Copy tensors into one buffer in the C++ packer's layout; the arguments are the attributes of this class.

        ``segment_lengths``, ``paths`` and ``cu_paths`` are given if sequences share tokens.
        """
        words = [_words(part) for part in (cu_seqlens, roles, paths, cu_paths) if part is not None]
        storage = torch.cat([input_ids, position_ids, label_rows, targets, sequences, *words])
        layout = PackedLayout(len(lengths), len(input_ids), len(targets), 0 if paths is None else len(paths))
        own = segment_lengths or (lengths if last_tokens else tuple(length - 1 for length in lengths))
        return cls(storage, layout, lengths, own, row_offsets, forget_sequences, last_tokens)


def _words(part: Tensor) -> Tensor:
    """Return a vector of a smaller dtype viewed as int64 words, padded with zeros to whole words."""
    per_word = 8 // part.element_size()
    return torch.nn.functional.pad(part, (0, -len(part) % per_word)).view(torch.int64)


def _retain_sequences(batch: PackedBatch) -> dict[str, Any]:
    """Return the arguments of ``PackedBatch.of`` for the retain sequences that do not depend on the tokens' places."""
    first, rows = batch.forget_sequences, batch.forget_rows
    return {
        "targets": batch.targets[rows:],
        "sequences": batch.sequences[first:],
        "roles": batch.roles[first:],
        "lengths": batch.lengths[first:],
        "row_offsets": tuple(offset - rows for offset in batch.row_offsets[first:]),
        "last_tokens": batch.last_tokens,
    }


def _retain_tree(batch: PackedBatch) -> PackedBatch:
    """Return the retain part of a batch on the CPU whose sequences share tokens.

    If a retain sequence keeps a copy of a token of a forget sequence, because all its tokens begin that sequence, later
    retain sequences do not share the copy. So the part can have more tokens than a batch of only these sequences.
    """
    first = batch.forget_sequences
    paths = batch.paths[int(batch.cu_paths[first]) :].numpy()
    # A token is stored where it first occurs on a path. A token has the same tokens before it on every path, so those
    # that occurred before are the first tokens of a path, and the rest of the path is a segment.
    kept = np.sort(np.unique(paths, return_index=True)[1])
    places = torch.from_numpy(paths[kept]).long()
    renumbered = torch.empty(batch.tokens, dtype=torch.int64)
    renumbered[places] = torch.arange(len(places))
    cu_paths = batch.cu_paths[first:] - batch.cu_paths[first]
    cu_seqlens = np.searchsorted(kept, cu_paths.numpy())
    return PackedBatch.of(
        input_ids=batch.input_ids[places],
        position_ids=batch.position_ids[places],
        label_rows=renumbered[batch.label_rows[batch.forget_rows :]],
        cu_seqlens=torch.from_numpy(cu_seqlens).int(),
        segment_lengths=tuple(np.diff(cu_seqlens).tolist()),
        paths=renumbered[torch.from_numpy(paths).long()].int(),
        cu_paths=cu_paths,
        **_retain_sequences(batch),
    )


def pack_items(
    stores: Sequence[TokenStore],
    roles: NDArray[np.int8],
    sequences: NDArray[np.int64],
    *,
    share: bool = False,
    last_tokens: bool = True,
    pin_memory: bool = False,
) -> PackedBatch:
    """Assemble sequences into one packed batch on the CPU, in the given order.

    Args:
        stores: the forget store, the retain store and, if alternate answers are used, the alternate store.
        roles: (S,) int8, ``Role`` of each sequence; forget and alternate sequences come first.
        sequences: (S,) int64, index of each sequence in the store of its role.
        share: whether to store tokens that sequences share, from the first token on, only once. Only models for which
            ``efface.hf.model.packing.shares_tokens`` is true can read such a batch.
        last_tokens: whether to include the last token of each sequence, which predicts nothing.
        pin_memory: allocate pinned memory, from which an accelerator can copy asynchronously.

    Raises:
        ValueError: if an index is out of range, a role has no store, or a sequence has no label.
    """
    native = _native(stores)
    options = {"share": share, "last_tokens": last_tokens}
    *layout, words = efface_native.measure(native, roles, sequences, **options)
    storage = torch.empty(words, dtype=torch.int64, pin_memory=pin_memory)
    packed = efface_native.pack(native, roles, sequences, storage.numpy(), **options)
    return PackedBatch(storage, PackedLayout(*layout), *packed, last_tokens=last_tokens)


def _native(stores: Sequence[TokenStore]) -> list[efface_native.TokenStore]:
    return [store.native(name) for store, name in zip(stores, _STORES, strict=False)]


def packed_size(
    stores: Sequence[TokenStore],
    roles: NDArray[np.int8],
    sequences: NDArray[np.int64],
    *,
    share: bool = False,
    last_tokens: bool = True,
) -> PackedLayout:
    """Return the sizes of the batch that ``pack_items`` returns for the same arguments, without assembling it.

    Raises:
        ValueError: for the reasons listed for ``pack_items``.
    """
    *layout, _ = efface_native.measure(_native(stores), roles, sequences, share=share, last_tokens=last_tokens)
    return PackedLayout(*layout)


def pack_store(
    store: TokenStore,
    sequences: NDArray[np.int64],
    *,
    share: bool = False,
    last_tokens: bool = True,
    pin_memory: bool = False,
) -> PackedBatch:
    """Assemble sequences of one store, with role ``RETAIN``; the arguments are those of ``pack_items``."""
    roles = np.full(len(sequences), Role.RETAIN, np.int8)
    stores = (TokenStore.empty(), store)
    return pack_items(stores, roles, sequences, share=share, last_tokens=last_tokens, pin_memory=pin_memory)


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
