"""The cached reference: one log-probability per sequence, computed once and kept in a file that all runs share."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from efface.batching import PackedBatch, Role, TokenStore
from efface.files import private_folder
from efface.hf.model.fingerprint import fingerprint, tf32
from efface.hf.model.head import head_of
from efface.hf.reference.score import packed_logprobs
from efface.hf.text.data import DataFacts
from efface.hf.text.token_cache import REFERENCE, cache_folder
from efface.reference import DistinctSequences, ReferenceCache
from efface_kernels import accumulation_dtype

NO_FILE = "none"
_SAMPLE = 4  # number of cached values that are computed again as a check
# Tolerance, in nats, for an ℓ that the same model computes in another batch or on another device: a few rounding
# errors of a logit between 16 and 32. The errors of n labels add up as √n.
_NOISE = {torch.float64: 1e-8, torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.5}

Numbers = NDArray[np.int64]  # numbers of distinct sequences, as in DistinctSequences
Progress = Callable[[int, int, int], None]


class ReferenceCallback(TrainerCallback):
    """A ``TrainerCallback`` with additional hooks for the work before training."""

    def on_data(self, data: Mapping[str, DataFacts]) -> None:
        """Receive, by role, which rows of which data are used."""

    def on_sharing(self, saved: float) -> None:
        """Receive the share of the tokens that training saves because sequences share them, 0 .. 1."""

    def on_reference(self, computed: int, missing: int, sequences: int) -> None:
        """Receive the progress of the reference computation.

        Args:
            computed: number of sequences computed so far.
            missing: number of sequences that the cache did not contain.
            sequences: number of distinct sequences.
        """


class CachedReference:
    """L_ref of every forget (and alternate) sequence; once constructed, the reference model is no longer needed.

    Values in the file are read, and a sample of them is checked. Missing values are computed and written after every
    forward pass. The ranks of a distributed run share the computation, and every rank gets all values. Only rank 0
    reads and writes the file, so the machines do not need to share one. If the file cannot be read or written, a
    warning is issued and the run continues without it.

    Args:
        model: the frozen model. Construct this object under the autocast in which the policy will run.
        stores: the sequences of each role.
        cache: path of the file; None is ``reference.sqlite`` in the cache folder, "none" uses no file.
        device: device on which to run the model, which is moved back afterwards; None leaves the model in place.
        share: run tokens that sequences of a forward pass share only once, if the model supports it.
        rank: rank of this process.
        world_size: number of processes.
        progress: called before the first and after every forward pass, with the arguments of
            ``ReferenceCallback.on_reference``.

    Attributes:
        sequences: number of distinct sequences.
        computed: number of distinct sequences that the file did not contain.
        path: on rank 0, the file, which now contains all values; None if no file is used.
        problem: on rank 0, the error for which the file could not be used, or None.

    Raises:
        ValueError: if the file is damaged or was written by another program, if its values differ from the model's,
            or for a sequence that the model cannot read, as in ``store_logprobs``.
        FloatingPointError: if a log-probability is not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stores: Mapping[Role, TokenStore],
        *,
        cache: str | Path | None = NO_FILE,
        device: torch.device | None = None,
        share: bool = True,
        rank: int = 0,
        world_size: int = 1,
        progress: Progress | None = None,
    ) -> None:
        stores = {role: store for role, store in stores.items() if len(store)}
        distinct = DistinctSequences(list(stores.values()))
        report = progress or (lambda *_: None)
        place = None if cache == NO_FILE else lambda: _place(cache)
        file = ReferenceCache(place, lambda: fingerprint(model), rank=rank, world_size=world_size)
        with _on_device(model, device), contextlib.closing(file):
            values = file.read(distinct.keys)
            missing = np.flatnonzero(np.isnan(values))
            _check(model, stores, distinct, values, str(file.path), share=share)
            self.sequences, self.computed = len(distinct), len(missing)
            done = 0
            report(done, self.computed, self.sequences)
            ranks = {"rank": rank, "world_size": world_size}
            for numbers, fresh in _scored(model, stores, distinct, missing, share=share, **ranks):
                _refuse_infinite(fresh)
                file.write([distinct.keys[k] for k in numbers], fresh)
                values[numbers] = fresh
                done += len(numbers)
                report(done, self.computed, self.sequences)
        self.path, self.problem = file.path, file.problem
        dtype = accumulation_dtype(head_of(model).weight.dtype)
        parts = zip(stores, distinct.spread(values), strict=True)
        self._sums = {role: torch.from_numpy(part).to(dtype) for role, part in parts}

    def sums(self, batch: PackedBatch) -> Tensor:
        """Return (S,) on the batch's device: L_ref of each sequence whose role is in ``stores``, 0 for the others."""
        device = batch.sequences.device
        result = torch.zeros(len(batch.lengths), dtype=next(iter(self._sums.values())).dtype, device=device)
        self._sums = {role: own.to(device) for role, own in self._sums.items()}
        for role, own in self._sums.items():
            chosen = batch.roles == role
            # Indices of other roles' sequences refer to other stores and can be out of range here.
            result = torch.where(chosen, own[torch.where(chosen, batch.sequences, 0)], result)
        return result


def _place(cache: str | Path | None) -> Path:
    if cache is not None:
        return Path(cache)
    path = private_folder(cache_folder()) / REFERENCE
    with contextlib.suppress(OSError):  # earlier versions created the file readable by other users
        path.chmod(0o600)
    return path


@contextlib.contextmanager
def _on_device(model: PreTrainedModel, device: torch.device | None) -> Iterator[None]:
    home = model.device
    if device is None or device.type == home.type:
        yield
        return
    torch.nn.Module.to(model, device)
    try:
        yield
    finally:
        torch.nn.Module.to(model, home)


def _scored(
    model: PreTrainedModel,
    stores: Mapping[Role, TokenStore],
    distinct: DistinctSequences,
    chosen: Numbers,
    *,
    share: bool,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Numbers, NDArray[np.float64]]]:
    """Score the chosen sequences; yield (numbers, L_ref) after each forward pass, with the results of all ranks."""
    for (role, store), (numbers, index) in zip(stores.items(), distinct.located(chosen), strict=True):
        if not len(index):
            continue
        done = 0
        options = {"name": role.name.lower(), "share": share, "rank": rank, "world_size": world_size}
        for sequences, own in packed_logprobs(model, store, index, **options):  # type: ignore[arg-type]
            sums = own.to(model.device if world_size > 1 else "cpu")
            if world_size > 1:
                torch.distributed.all_reduce(sums)
            end = done + len(sequences)  # the sequences come in the order of `index`
            yield numbers[done:end], sums.cpu().double().numpy()
            done = end


def _refuse_infinite(values: NDArray[np.float64]) -> None:
    if not np.isfinite(values).all():
        raise FloatingPointError(
            "reference model: expected finite log-probabilities, got NaN or infinity; check its weights, or run it in "
            "--bf16 instead of --fp16"
        )


def _check(
    model: PreTrainedModel,
    stores: Mapping[Role, TokenStore],
    distinct: DistinctSequences,
    values: NDArray[np.float64],
    place: str,
    *,
    share: bool,
) -> None:
    """Compute a sample of the cached values again; raise ValueError if one differs from the cached value."""
    there = np.flatnonzero(~np.isnan(values))
    sample = np.unique(there[np.linspace(0, len(there) - 1, min(len(there), _SAMPLE)).astype(np.int64)])
    for numbers, fresh in _scored(model, stores, distinct, sample, share=share):
        allowed = _noise(model) * (np.sqrt(distinct.labels[numbers]) + np.abs(values[numbers]) / 64)
        wrong = np.flatnonzero(~(np.abs(fresh - values[numbers]) <= allowed))
        if wrong.size:
            k = int(wrong[0])
            raise ValueError(
                f"reference cache {place!r}: expected the log-probability {fresh[k]:.6g}, which the model computes for "
                f"a sequence, got {values[numbers[k]]:.6g} (allowed difference {allowed[k]:.2g}); delete the file, or "
                "set --reference-cache to another one or to none"
            )


def _noise(model: PreTrainedModel) -> float:
    device = model.device.type
    dtype = head_of(model).weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif dtype == torch.float32 and device == "cuda" and tf32():
        dtype = torch.float16  # TF32 has as many mantissa bits
    return _NOISE[dtype]
