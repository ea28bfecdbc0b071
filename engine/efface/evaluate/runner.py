"""What evaluations are made of: tasks, the rows that they finished, and the processes that share them out.

A ``Task`` has rows to compute with a model, in batches that data and settings alone decide. ``run_tasks`` shares the
batches out over processes and tells every process all results. ``RowStore`` keeps finished rows in one SQLite file, so
that a killed evaluation goes on where it was.
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
"""What a task found out about a row, as JSON: it is stored, gathered from processes and read again as it is."""
Progress = Callable[[str, int, int], None]
"""Called with the task at hand, how many rows of all tasks are done, and how many there are."""

T = TypeVar("T")
_Job = tuple[int, NDArray[np.int64]]  # a task's number, and the rows of one of its batches


class NotFiniteError(FloatingPointError, ValueError):
    """Numbers of a model that are none: the model is broken, not what it was asked."""


_KINDS: tuple[type[Exception], ...] = (NotFiniteError, ValueError, OSError)
"""Errors that every process raises as what they are on one of them."""


class Task(Protocol):
    """Results of a model, one for each row.

    Attributes:
        name: for messages and progress.
        keys: (rows,) what a row's result depends on beside the model: its text or tokens and every setting, hashed.
            Rows with equal keys have equal results.
        batches: every row in exactly one; a function of data and settings, not of processes or of what is known, so
            that the same rows always share a forward pass and give the same bits.
    """

    name: str
    keys: Sequence[bytes]
    batches: Sequence[NDArray[np.int64]]

    def run(self, model: PreTrainedModel, rows: NDArray[np.int64]) -> list[RowResult]:
        """Compute one batch: a result for each of its rows, in order."""


class RowStore(KeyedStore):
    """A file of results: (model fingerprint, key of a row's task) -> JSON; see ``KeyedStore``.

    Results of other models, texts and settings lie beside one another and never meet: all of that is in the keys.
    """

    table = KeyedTable(
        name="rows",
        key="row",
        value="result",
        kind="TEXT",
        application=0x65666672,  # "effr"
        version=1,
        file="evaluated rows",
        remedy="delete the file: the rows are then computed anew",
    )

    @staticmethod
    def encoded(values: Sequence[Any]) -> Sequence[bytes]:
        """Return texts in UTF-8; what is read is that already."""
        return [value.encode() if isinstance(value, str) else value for value in values]

    def get(self, model: bytes, keys: Sequence[bytes]) -> list[RowResult | None]:
        """Return the results of a model's rows, in order; None where there is none."""
        found = self.read(model, keys)
        return [json.loads(found[key]) if key in found else None for key in keys]

    def put(self, model: bytes, keys: Sequence[bytes], results: Sequence[RowResult]) -> None:
        """Add results of a model's rows, all or none; of a key that is there already, the result stays."""
        self.write(model, keys, [json.dumps(result) for result in results])


def run_tasks(
    model: Any, tasks: Sequence[Task], *, store: str | Path | None = None, progress: Progress | None = None
) -> list[list[RowResult]]:
    """Return what each of the tasks finds out about each of its rows.

    Under ``accelerate`` (torchrun, a Trainer on several GPUs) every process calls this with equal tasks and gets all
    results. A batch is never split, so they are the same bits on any number of processes. The model is evaluated
    without gradients, in evaluation mode; its modes and the random-number generators are afterwards what they were.

    Args:
        model: a causal language model, also wrapped by DistributedDataParallel.
        tasks: what to run; batches are taken in their order.
        store: a file in which the first process keeps finished rows, batch by batch, and finds those of an earlier
            call; see ``RowStore``. None keeps them in memory.
        progress: called on every process, before the first and after every turn of the processes.

    Raises:
        TypeError: no model.
        ValueError: a model whose weights are spread over processes, or with an adapter that packs cannot serve; a
            damaged store; whatever a task refuses.
        OSError: a store that cannot be read or written.
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
        failed: Exception | None = None  # of the file, on the first process: told to the others with the next turn
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
    """Return what results depend on beside a task's keys: the model as it is now, what ends its answers, and efface."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = [fingerprint(model).hex(), ends, version("efface")]
    return hashlib.blake2b(json.dumps(known).encode(), digest_size=16).digest()


class _Known:
    """The row store of the first process; of the others, or without a file, nothing."""

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
        """Keep results; return what went wrong."""
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
    """Return the model without wrappers; raise ValueError if no process has all of its weights."""
    sharded = any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters()
    )
    if sharded:
        raise ValueError(
            f"{type(model).__name__}: expected a whole model on every process, got weights that FSDP, tensor "
            "parallelism or ZeRO-3 spread over them; save it and run `efface evaluate` on the checkpoint, or train "
            "with DDP or ZeRO-2 to evaluate on the way"
        )
    return extract_model_from_parallel(model)


def _turns(jobs: Sequence[_Job], processes: int) -> Iterator[Sequence[_Job]]:
    """Yield as many jobs at a time as there are processes; neighbours, which take about as long."""
    for first in range(0, len(jobs), processes):
        yield jobs[first : first + processes]


def _run(
    state: PartialState, model: Any, tasks: Sequence[Task], turn: Sequence[_Job], error: Exception | None
) -> list[list[RowResult]]:
    """Run one job a process and return the results of all; an error of one process is raised on all of them.

    ``error`` is one that this process met before.
    """
    mine: list[RowResult] = []
    if state.num_processes == 1:
        _raise(error)
    if error is None and state.process_index < len(turn):
        number, batch = turn[state.process_index]
        try:
            # Through JSON, so that a result is the same whether it comes from the store or not.
            mine = json.loads(json.dumps(tasks[number].run(model, batch)))
        except Exception as caught:
            if state.num_processes == 1:
                raise
            error = caught
    if state.num_processes == 1:
        return [mine]
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
    told = gather_object([(mine, None if error is None else (kind, repr(error)))])
    _raise(error)
    for process, (_, failure) in enumerate(told):
        if failure is not None:
            raise failure[0](f"process {process} of the evaluation: {failure[1]}")
    return [results for results, _ in told[: len(turn)]]


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def on_first(state: PartialState, read: Callable[[], T]) -> T:
    """Return on every process what the first one read, or raise what it raised."""
    told: list[Any] = [None]
    if state.is_main_process:
        try:
            told = [read()]
        except Exception as error:
            if state.num_processes == 1:
                raise
            told = [error]
    if state.num_processes > 1:
        broadcast_object_list(told)
    if isinstance(told[0], Exception):
        raise told[0]
    answer: T = told[0]
    return answer


def _done(results: Sequence[Sequence[RowResult | None]]) -> int:
    return sum(result is not None for part in results for result in part)


def _complete(task: Task, results: Sequence[RowResult | None]) -> list[RowResult]:
    there = [result for result in results if result is not None]
    if len(there) != len(results):
        raise ValueError(f"{task.name}: expected batches of all {len(results)} rows, got {len(there)}")
    return there
