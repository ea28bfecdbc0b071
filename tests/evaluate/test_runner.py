"""Tests of running tasks: every row once, finished rows kept, rows of other models never used, the model unchanged."""

import json
import random
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from efface.evaluate import RowResult, run_tasks
from efface.evaluate.runner import RowStore, model_key
from support.helpers import tiny_llama
from support.processes import RANKS, launch


class Sums:
    """A task that adds a number to a weight of the model and records its batches."""

    def __init__(self, numbers: Sequence[float], size: int, name: str = "sums") -> None:
        self.name = name
        self.numbers = numbers
        self.keys = [f"{name} {number}".encode() for number in numbers]
        self.batches = [np.arange(first, min(first + size, len(numbers))) for first in range(0, len(numbers), size)]
        self.ran: list[list[int]] = []

    def run(self, model: Any, rows: NDArray[np.int64]) -> list[RowResult]:
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(())
        random.random()
        self.ran.append(rows.tolist())
        bias = float(next(model.parameters()).flatten()[0])
        return [{"sum": bias + self.numbers[row], "where": [row, None]} for row in rows.tolist()]


def bias_of(model: nn.Module) -> float:
    return float(next(model.parameters()).detach().flatten()[0])


def test_every_row_is_computed_once_and_the_model_left_as_it_was() -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    tasks, seen = [Sums([1, 2, 3, 4, 5], 2), Sums([0.1], 3, "other"), Sums([], 3, "empty")], []
    before = torch.get_rng_state(), random.getstate()
    results = run_tasks(model, tasks, progress=lambda *state: seen.append(state))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert [module.training for module in model.modules()] == modes
    bias = bias_of(model)
    assert results == [
        [{"sum": bias + number, "where": [row, None]} for row, number in enumerate(task.numbers)] for task in tasks
    ]
    assert [task.ran for task in tasks] == [[[0, 1], [2, 3], [4]], [[0]], []]
    assert seen == [("sums", 0, 6), ("sums", 2, 6), ("sums", 4, 6), ("other", 5, 6), ("empty", 6, 6)]
    assert run_tasks(model, []) == []


def test_finished_rows_are_found_again_whatever_the_batches(tmp_path: Path) -> None:
    model, path = tiny_llama(), tmp_path / "out" / ".rows.sqlite"
    first, again, more = Sums([1, 2, 3], 2), Sums([3, 2, 1], 1), Sums([2, 7, 1, 8], 2)
    expected = run_tasks(model, [first], store=path)[0]
    assert [row["sum"] for row in run_tasks(model, [again], store=path)[0]] == [row["sum"] for row in expected[::-1]]
    assert again.ran == []
    # A batch with a missing row is run completely, as the first time.
    assert [row["sum"] - bias_of(model) for row in run_tasks(model, [more], store=path)[0]] == pytest.approx(
        [2, 7, 1, 8]
    )
    assert more.ran == [[0, 1], [2, 3]]


def test_rows_of_another_model_are_never_taken(tmp_path: Path) -> None:
    path = tmp_path / "rows.sqlite"
    run_tasks(tiny_llama(), [Sums([1], 1)], store=path)
    other, task = tiny_llama(), Sums([1], 1)
    with torch.no_grad():
        next(other.parameters()).flatten()[0] += 1e-7
    assert run_tasks(other, [task], store=path)[0][0]["sum"] == bias_of(other) + 1
    assert task.ran


def test_the_key_of_a_model_is_its_content_and_what_ends_its_answers() -> None:
    model, same = tiny_llama(), tiny_llama()
    assert model_key(model) == model_key(same)
    same.generation_config.eos_token_id = [1, 2]
    assert model_key(model) != model_key(same)
    assert model_key(model) != model_key(tiny_llama(seed=1))


def test_finished_rows_of_a_failing_evaluation_are_kept(tmp_path: Path) -> None:
    class Failing(Sums):
        def run(self, model: Any, rows: NDArray[np.int64]) -> list[RowResult]:
            if 4 in rows:
                raise ValueError("row 4 is too long")
            return super().run(model, rows)

    model, path = tiny_llama(), tmp_path / "rows.sqlite"
    with pytest.raises(ValueError, match="row 4 is too long"):
        run_tasks(model, [Failing(range(6), 2)], store=path)
    rest = Sums(range(6), 2)
    run_tasks(model, [rest], store=path)
    assert rest.ran == [[4, 5]]


def test_a_full_disk_ends_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, task = RowStore.put, Sums(range(6), 2)

    def full(store: RowStore, model: bytes, keys: Sequence[bytes], results: Sequence[RowResult]) -> None:
        if len(task.ran) == 2:
            raise OSError("no space left")
        put(store, model, keys, results)

    monkeypatch.setattr(RowStore, "put", full)
    with pytest.raises(OSError, match="no space left"):
        run_tasks(tiny_llama(), [task], store=tmp_path / "rows.sqlite")
    assert len(task.ran) == 2


def test_a_prompt_that_was_learnt_is_refused() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    model = peft.get_peft_model(tiny_llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="adapter 'default': expected an adapter of layer weights"):
        run_tasks(model, [Sums([1], 1)])


def test_a_damaged_row_is_recomputed_and_a_damaged_store_is_not_changed(tmp_path: Path) -> None:
    model, path = tiny_llama(), tmp_path / "rows.sqlite"
    right = run_tasks(model, [Sums([1], 1)], store=path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE rows SET result = '{\"sum\": 9}'")
        database.commit()
    anew, kept = Sums([1], 1), Sums([1], 1)
    with pytest.warns(UserWarning, match=r"evaluated rows '.*': 1 damaged row is computed again"):
        assert run_tasks(model, [anew], store=path) == right
    assert run_tasks(model, [kept], store=path) == right
    assert (anew.ran, kept.ran) == ([[0]], [])
    path.write_text("no database, but long enough to be read as one" * 100)
    with pytest.raises(ValueError, match="evaluated rows '.*': .*delete the file: the rows are then computed again"):
        run_tasks(model, [Sums([1], 1)], store=path)
    with pytest.raises(OSError, match="unable to open|directory"):
        run_tasks(model, [Sums([1], 1)], store=tmp_path)


def test_results_are_json(tmp_path: Path) -> None:
    class Numpy(Sums):
        def run(self, model: Any, rows: NDArray[np.int64]) -> list[RowResult]:
            return [{"sum": np.float32(1)} for _ in rows]

    with pytest.raises(TypeError, match="not JSON serializable"):
        run_tasks(tiny_llama(), [Numpy([1], 1)])
    values = {"value": 0.1 + 0.2, "small": 5e-324, "text": "naïve\u2028\ud83d\ude00", "none": None, "nan": float("nan")}
    with closing(RowStore(tmp_path / "rows.sqlite")) as store:
        store.put(b"model", [b"a", b"b", b"a"], [values, {}, {"later": 1}])
        found = store.get(b"model", [b"b", b"c", b"a"])
        assert store.get(b"other", [b"a"]) == [None]
    assert found[:2] == [{}, None]
    assert json.dumps(found[2]) == json.dumps(values)


def test_batches_have_to_hold_every_row() -> None:
    task = Sums([1, 2], 1)
    task.batches = task.batches[:1]
    with pytest.raises(ValueError, match="sums: expected batches that cover all 2 rows, got 1"):
        run_tasks(tiny_llama(), [task])


def test_a_model_spread_over_processes_is_refused() -> None:
    model = tiny_llama()
    next(model.parameters()).ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="expected the whole model on every process.*efface evaluate"):
        run_tasks(model, [Sums([1], 1)])


@pytest.mark.slow
@pytest.mark.parametrize("when", ["middle", "end"])
def test_a_file_that_fails_the_first_process_fails_all(when: str, tmp_path: Path) -> None:
    done = launch(2, [str(RANKS / "failing_rank.py"), str(tmp_path), when])
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "rank0.txt").read_text() == "no space left"
    assert "no space left" in (tmp_path / "rank1.txt").read_text()


@pytest.mark.slow
def test_an_error_of_one_process_is_raised_on_all_and_finished_rows_are_kept(tmp_path: Path) -> None:
    done = launch(2, [str(RANKS / "failing_rank.py"), str(tmp_path)])
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "rank1.txt").read_text() == "row 3 is too long"
    assert "process 1 of the evaluation: ValueError('row 3 is too long')" in (tmp_path / "rank0.txt").read_text()
    with closing(RowStore(tmp_path / "rows.sqlite")) as store:
        found = store.get(model_key(tiny_llama()), [b"0", b"1", b"2", b"3"])
    assert found == [{"row": 0}, {"row": 1}, None, None]


def test_a_wrapped_model_is_unwrapped() -> None:
    class Plain(Sums):
        def run(self, model: Any, rows: NDArray[np.int64]) -> list[RowResult]:
            assert isinstance(model, PreTrainedModel)
            return super().run(model, rows)

    model = tiny_llama()
    assert run_tasks(nn.DataParallel(model), [Plain([1], 1)])[0][0]["sum"] == bias_of(model) + 1
