"""The cached reference: the frozen model remembered as one number a sequence, in a file that runs share."""

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
_SAMPLE = 4  # sequences of the file that are scored anew
# Nats by which an ℓ may differ when the same model computes it in another batch or on another device: a few roundings
# of a logit between 16 and 32. The errors of n labels add up as √n.
_NOISE = {torch.float64: 1e-8, torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.5}

Numbers = NDArray[np.int64]  # of distinct sequences
Progress = Callable[[int, int, int], None]


class ReferenceCallback(TrainerCallback):
    """A trainer's callback that also follows what happens before training."""

    def on_data(self, data: Mapping[str, DataFacts]) -> None:
        """Be told what was taken of which data, by role."""

    def on_reference(self, computed: int, missing: int, sequences: int) -> None:
        """Follow: of so many distinct sequences, some were missing in the cache, of which some are computed."""


class CachedReference:
    """L_ref of every forget (and alternate) sequence; the reference model is not needed afterwards.

    What the file has is read, and checked on a sample; what it lacks is computed, and written pass by pass. The ranks
    of a distributed run share the work, and all know all sums; the first alone reads and writes the file, so that
    machines need not share one. A file that cannot be used costs a warning.

    Args:
        model: the frozen model, called under the autocast in which the policy will run.
        stores: the sequences of each role.
        cache: the file; None is ``reference.sqlite`` in the cache folder, "none" no file.
        device: where to run the model, which goes back afterwards; None is where it is.
        rank: this process.
        world_size: of how many.
        progress: called before the first and after every forward pass, as ``ReferenceCallback.on_reference``.

    Attributes:
        sequences: distinct sequences.
        computed: how many of them the file did not have.
        path: on the first rank, the file that has all of them now; None where there is none.
        problem: why the file could not be used, or None.

    Raises:
        ValueError: a damaged or foreign file, or one with other values than the model's; as ``store_logprobs``.
        FloatingPointError: a log-probability that is not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stores: Mapping[Role, TokenStore],
        *,
        cache: str | Path | None = NO_FILE,
        device: torch.device | None = None,
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
            _check(model, stores, distinct, values, str(file.path))
            self.sequences, self.computed = len(distinct), len(missing)
            done = 0
            report(done, self.computed, self.sequences)
            for numbers, fresh in _scored(model, stores, distinct, missing, rank=rank, world_size=world_size):
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
        """Return (S,) on the batch's device: L_ref of its sequences of the roles in ``stores``, 0 for the others."""
        device = batch.sequences.device
        result = torch.zeros(len(batch.lengths), dtype=next(iter(self._sums.values())).dtype, device=device)
        self._sums = {role: own.to(device) for role, own in self._sums.items()}
        for role, own in self._sums.items():
            chosen = batch.roles == role
            # The index of another store's sequence is no index here.
            result = torch.where(chosen, own[torch.where(chosen, batch.sequences, 0)], result)
        return result


def _place(cache: str | Path | None) -> Path:
    return private_folder(cache_folder()) / REFERENCE if cache is None else Path(cache)


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
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Numbers, NDArray[np.float64]]]:
    """Score the chosen sequences; yield what a forward pass (of every rank) gave."""
    for (role, store), (numbers, index) in zip(stores.items(), distinct.located(chosen), strict=True):
        if not len(index):
            continue
        done = 0
        options = {"name": role.name.lower(), "rank": rank, "world_size": world_size}
        for sequences, own in packed_logprobs(model, store, index, **options):  # type: ignore[arg-type]
            sums = own.to(model.device if world_size > 1 else "cpu")
            if world_size > 1:
                torch.distributed.all_reduce(sums)
            end = done + len(sequences)  # they come in the order of `index`
            yield numbers[done:end], sums.cpu().double().numpy()
            done = end


def _refuse_infinite(values: NDArray[np.float64]) -> None:
    if not np.isfinite(values).all():
        raise FloatingPointError(
            "the reference model gives a log-probability that is not finite; check its weights, or run it in --bf16 "
            "instead of --fp16"
        )


def _check(
    model: PreTrainedModel,
    stores: Mapping[Role, TokenStore],
    distinct: DistinctSequences,
    values: NDArray[np.float64],
    place: str,
) -> None:
    """Score a sample of the values that were in the file anew; raise ValueError if they are another model's."""
    there = np.flatnonzero(~np.isnan(values))
    sample = np.unique(there[np.linspace(0, len(there) - 1, min(len(there), _SAMPLE)).astype(np.int64)])
    for numbers, fresh in _scored(model, stores, distinct, sample):
        allowed = _noise(model) * (np.sqrt(distinct.labels[numbers]) + np.abs(values[numbers]) / 64)
        wrong = np.flatnonzero(~(np.abs(fresh - values[numbers]) <= allowed))
        if wrong.size:
            k = int(wrong[0])
            raise ValueError(
                f"reference cache {place!r}: expected the model's own log-probabilities, got {values[numbers[k]]:.6g} "
                f"for a sequence with {fresh[k]:.6g} (allowed difference {allowed[k]:.2g}); delete the file, or set "
                "--reference-cache to another one or to none"
            )


def _noise(model: PreTrainedModel) -> float:
    device = model.device.type
    dtype = head_of(model).weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif dtype == torch.float32 and device == "cuda" and tf32():
        dtype = torch.float16  # TF32 has as many bits
    return _NOISE[dtype]
