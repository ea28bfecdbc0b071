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


@dataclass(frozen=True)
class PackedBatch:
    """S sequences of T tokens in all, N label rows; all forget sequences stand before all retain sequences.

    Attributes:
        input_ids: (T,) int64.
        position_ids: (T,) int64, from 0 in each sequence.
        cu_seqlens: (S + 1,) int32; sequence s owns tokens ``cu_seqlens[s]`` .. ``cu_seqlens[s + 1] − 1``.
        label_rows: (N,) int64, the positions whose hidden state predicts a label.
        targets: (N,) int64, those labels.
        roles: (S,) int8, a ``Role`` each.
        row_offsets: S + 1 integers on the host: the label rows of each sequence.
        lengths: S integers on the host: the tokens of each sequence.
        forget_sequences: how many sequences are forget ones.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    label_rows: Tensor
    targets: Tensor
    roles: Tensor
    row_offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    forget_sequences: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """Return the batch with its tensors on ``device``; what the host plans with stays on the host."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("input_ids", "position_ids", "cu_seqlens", "label_rows", "targets", "roles")
        }
        return replace(self, **moved)

    def forget_part(self) -> "PackedBatch":
        """Return the forget sequences alone, as views: what a live reference model has to read."""
        count = self.forget_sequences
        tokens, rows = sum(self.lengths[:count]), self.row_offsets[count]
        return PackedBatch(
            input_ids=self.input_ids[:tokens],
            position_ids=self.position_ids[:tokens],
            cu_seqlens=self.cu_seqlens[: count + 1],
            label_rows=self.label_rows[:rows],
            targets=self.targets[:rows],
            roles=self.roles[:count],
            row_offsets=self.row_offsets[: count + 1],
            lengths=self.lengths[:count],
            forget_sequences=count,
        )


def pack(
    forget: TokenStore,
    retain: TokenStore,
    forget_index: Sequence[int] | NDArray[np.int64],
    retain_index: Sequence[int] | NDArray[np.int64],
) -> PackedBatch:
    """Assemble the chosen sequences into one packed batch on the CPU.

    Raises:
        ValueError: an index out of range, a sequence without a label, an inconsistent store.
    """
    sequences = np.concatenate([np.asarray(forget_index, np.int64), np.asarray(retain_index, np.int64)])
    roles = np.repeat(np.array([Role.FORGET, Role.RETAIN], np.int8), [len(forget_index), len(retain_index)])
    choice = (forget.arrays, retain.arrays, roles, sequences)
    count, tokens, rows = efface_native.measure(*choice)
    buffers = {
        "input_ids": np.empty(tokens, np.int64),
        "position_ids": np.empty(tokens, np.int64),
        "cu_seqlens": np.empty(count + 1, np.int32),
        "label_rows": np.empty(rows, np.int64),
        "targets": np.empty(rows, np.int64),
        "row_offsets": np.empty(count + 1, np.int64),
    }
    efface_native.pack(*choice, **buffers)
    row_offsets = tuple(buffers.pop("row_offsets").tolist())
    return PackedBatch(
        **{name: torch.from_numpy(buffer) for name, buffer in buffers.items()},
        roles=torch.from_numpy(roles),
        row_offsets=row_offsets,
        lengths=tuple(np.diff(buffers["cu_seqlens"]).tolist()),
        forget_sequences=len(forget_index),
    )
