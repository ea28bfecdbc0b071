"""Evaluation tasks, the function that runs them on one or more processes, and the file of finished rows.

A ``Task`` computes one result per row with a model, batch by batch. The batches depend only on data and settings.
``run_tasks`` distributes the batches over the processes and gives all results to every process. ``RowStore`` keeps
finished rows in one SQLite file, so that a killed evaluation can resume.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, extract_model_from_parallel, gather_object
from numpy.typing import NDArray
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from efface.hf.model.adapted_head import base_of
from efface.hf.model.fingerprint import fingerprint
from efface.hf.model.supported import check_adapters, check_loaded, undisturbed
from efface.keyed_store import KeyedStore, KeyedTable
from efface.processes import processes

RowResult: TypeAlias = dict[str, Any]
"""A task's result for one row, as JSON values: results are stored in a file and sent between processes."""
Progress = Callable[[str, int, int], None]
"""Called with the name of the current task, the number of finished rows of all tasks, and the number of all rows."""

T = TypeVar("T")
_Job = tuple[int, NDArray[np.int64]]  # index of a task, and the rows of one of its batches


class NotFiniteError(FloatingPointError, ValueError):
    """Raised if a model returns NaN or infinity: the fault lies with the model, not with the input."""


_KINDS: tuple[type[Exception], ...] = (NotFiniteError, ValueError, OSError)
"""Exception types that keep their type when the other processes raise them too; all others become RuntimeError."""


class Task(Protocol):
    """A computation that gives one result per row.

    Attributes:
        name: used in messages and progress.
        keys: (rows,) hash of everything that a row's result depends on except the model: its text or tokens and every
            setting. Rows with equal keys have equal results.
        batches: row numbers of each batch; every row is in exactly one batch. They depend on data and settings, but
            not on the number of processes or on stored results. The same rows therefore always share a forward pass
            and give the same bits.
    """

    name: str
    keys: Sequence[bytes]
    batches: Sequence[NDArray[np.int64]]

    def run(self, model: PreTrainedModel, rows: NDArray[np.int64]) -> list[RowResult]:
        """Compute one batch and return a result for each of its rows, in order."""


class RowStore(KeyedStore):
    """A ``KeyedStore`` that maps (key of the model, key of the row) to a result as JSON.

    One file can keep results of different models, texts and settings, because the two keys cover all of these.
    """

    table = KeyedTable(
        name="rows",
        key="row",
        value="result",
        kind="TEXT",
        application=0x65666672,  # "effr"
        version=1,
        file="evaluated rows",
        remedy="delete the file: the rows are then computed again",
    )

    @staticmethod
    def encoded(values: Sequence[Any]) -> Sequence[bytes]:
        """Return each value as UTF-8 bytes. Values read from the file are already bytes."""
        return [value.encode() if isinstance(value, str) else value for value in values]

    def get(self, model: bytes, keys: Sequence[bytes]) -> list[RowResult | None]:
        """Return a model's results for ``keys``, in order, with None for each key that is not in the file."""
        found = self.read(model, keys)
        return [json.loads(found[key]) if key in found else None for key in keys]

    def put(self, model: bytes, keys: Sequence[bytes], results: Sequence[RowResult]) -> None:
        """Add results of a model's rows in one transaction. A key that is already in the file keeps its result."""
        self.write(model, keys, [json.dumps(result) for result in results])


def run_tasks(
    model: Any, tasks: Sequence[Task], *, store: str | Path | None = None, progress: Progress | None = None
) -> list[list[RowResult]]:
    """Run the tasks and return, for each task, its result for each row.

    Under ``accelerate`` (torchrun, a Trainer on several GPUs) every process calls this function with equal tasks and
    gets all results. A batch is never split, so the results are bitwise equal for any number of processes. The model
    runs without gradients and in evaluation mode. Afterwards, the modes of its modules and the states of the
    random-number generators are restored.

    Args:
        model: a causal language model, optionally wrapped by DistributedDataParallel.
        tasks: the tasks to run. Their batches run in order.
        store: a file in which the first process saves finished rows after each batch, and from which it reads the rows
            of earlier calls; see ``RowStore``. None keeps results in memory only.
        progress: called on every process before the first turn and after each turn. In a turn, every process runs one
            batch.

    Raises:
        TypeError: ``model`` is not a model.
        ValueError: the model's weights are sharded over processes; the model has an adapter that does not work with
            packed batches; the store is damaged; or a task raises ValueError.
        OSError: the store cannot be read or written.
    """
    check_loaded(model)
    state = processes()
    policy = _whole(model)
    check_adapters(policy, base_of(policy))
    results: list[list[RowResult | None]] = [[None] * len(task.keys) for task in tasks]
    rows = sum(map(len, results))
    with undisturbed(policy), torch.no_grad(), contextlib.ExitStack() as stack:
        known = _Known(policy, store if state.is_main_process else None)
        stack.callback(known.close)
        if store is not None:
            results = on_first(state, lambda: [known.get(task.keys) for task in tasks])
        jobs = [
            (number, batch)
            for number, task in enumerate(tasks)
            for batch in task.batches
            if any(results[number][row] is None for row in batch.tolist())
        ]
        failed: Exception | None = None  # from the store, on the first process; the next turn reports it to the others
        for turn in _turns(jobs, state.num_processes):
            if progress is not None:
                progress(tasks[turn[0][0]].name, _done(results), rows)
            for (number, batch), found in zip(turn, _run(state, policy, tasks, turn, failed), strict=True):
                failed = failed or known.put([tasks[number].keys[row] for row in batch.tolist()], found)
                for row, result in zip(batch.tolist(), found, strict=True):
                    if results[number][row] is None:
                        results[number][row] = result
        on_first(state, lambda: _raise(failed))
        if progress is not None and rows:
            progress(tasks[-1].name, _done(results), rows)
    return [_complete(task, part) for task, part in zip(tasks, results, strict=True)]


def model_key(model: PreTrainedModel) -> bytes:
    """Return a hash of the model's weights, the end tokens of its generation_config, and the version of efface.

    Together with the key of a row, it covers everything that a result depends on.
    """
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = [fingerprint(model).hex(), ends, version("efface")]
    return hashlib.blake2b(json.dumps(known).encode(), digest_size=16).digest()


class _Known:
    """The row store on the first process. On other processes, or without a file, it keeps and finds no results."""

    def __init__(self, model: PreTrainedModel, place: str | Path | None) -> None:
        self._model, self._place = model, place
        self._store: RowStore | None = None
        self._key = b""

    def get(self, keys: Sequence[bytes]) -> list[RowResult | None]:
        if self._place is None:
            return [None] * len(keys)
        if self._store is None:
            self._store, self._key = RowStore(self._place), model_key(self._model)
        return self._store.get(self._key, keys)

    def put(self, keys: Sequence[bytes], results: Sequence[RowResult]) -> Exception | None:
        """Save results. Return the error if that fails, so that it can be raised on all processes together."""
        try:
            if self._store is not None:
                self._store.put(self._key, keys, results)
        except (OSError, ValueError) as error:
            return error
        return None

    def close(self) -> None:
        if self._store is not None:
            self._store.close()


def _whole(model: Any) -> Any:
    """Return the model without wrappers, or raise ValueError if its weights are sharded over processes."""
    sharded = any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters()
    )
    if sharded:
        raise ValueError(
            f"{type(model).__name__}: expected the whole model on every process, got weights that FSDP, tensor "
            "parallelism or ZeRO-3 has sharded; save the model and run `efface evaluate` on the checkpoint, or train "
            "with DDP or ZeRO-2 to evaluate during training"
        )
    return extract_model_from_parallel(model)


def _turns(jobs: Sequence[_Job], processes: int) -> Iterator[Sequence[_Job]]:
    """Yield consecutive groups of ``processes`` jobs. Neighbouring jobs take about the same time."""
    for first in range(0, len(jobs), processes):
        yield jobs[first : first + processes]


def _run(
    state: PartialState, model: Any, tasks: Sequence[Task], turn: Sequence[_Job], error: Exception | None
) -> list[list[RowResult]]:
    """Run one job on each process and return the results of all jobs. An error on one process is raised on all.

    ``error`` is an earlier error of this process, which is raised instead of running its job.
    """
    mine: list[RowResult] = []
    if state.num_processes == 1:
        _raise(error)
    if error is None and state.process_index < len(turn):
        number, batch = turn[state.process_index]
        try:
            # The round trip through JSON makes a computed result equal to one that is read from the store.
            mine = json.loads(json.dumps(tasks[number].run(model, batch)))
        except Exception as caught:
            if state.num_processes == 1:
                raise
            error = caught
    if state.num_processes == 1:
        return [mine]
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
    gathered = gather_object([(mine, None if error is None else (kind, repr(error)))])
    _raise(error)
    for process, (_, failure) in enumerate(gathered):
        if failure is not None:
            raise failure[0](f"process {process} of the evaluation: {failure[1]}")
    return [results for results, _ in gathered[: len(turn)]]


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def on_first(state: PartialState, read: Callable[[], T]) -> T:
    """Call ``read`` on the first process and return its result on every process, or raise its error on every one."""
    message: list[Any] = [None]
    if state.is_main_process:
        try:
            message = [read()]
        except Exception as error:
            if state.num_processes == 1:
                raise
            message = [error]
    if state.num_processes > 1:
        broadcast_object_list(message)
    if isinstance(message[0], Exception):
        raise message[0]
    answer: T = message[0]
    return answer


def _done(results: Sequence[Sequence[RowResult | None]]) -> int:
    return sum(result is not None for part in results for result in part)


def _complete(task: Task, results: Sequence[RowResult | None]) -> list[RowResult]:
    there = [result for result in results if result is not None]
    if len(there) != len(results):
        raise ValueError(f"{task.name}: expected batches that cover all {len(results)} rows, got {len(there)} rows")
    return there
