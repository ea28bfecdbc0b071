"""Tests of rows in both the forget and the retain set: found by their tokens, in every place that takes two sets."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from efface import DPO, GradAscent, GradDiff, IdkNLL
from efface.batching import TokenStore
from efface.cli.main import main
from efface.hf.text.data import refuse_overlap, shared_sequences, token_store
from efface.hf.train.trainer import UnlearnTrainer
from support.helpers import TEXTS, arguments, random_store, saved_llama, tiny_llama, tiny_tokenizer, written_rows

FORGET, RETAIN = TEXTS[:3], TEXTS[2:]  # one row is in both
MESSAGE = r"got 1 of 3 forget rows in both: rows 2 and 0 \(.*; remove them from one set .* or add --allow-overlap"


def of(*sequences: list[int], starts: list[int] | None = None) -> TokenStore:
    return TokenStore.from_sequences(sequences, starts or [1] * len(sequences))


# ---- which rows are equal

SAME: dict[str, tuple[TokenStore, TokenStore, bool, list[tuple[int, int]]]] = {
    # forget, retain, whether only prompts are compared, the pairs
    "none": (of([1, 2], [3, 4]), of([2, 1], [4, 3, 2]), False, []),
    "some": (of([1, 2], [3, 4], [5, 6]), of([5, 6], [7, 8], [1, 2]), False, [(0, 2), (2, 0)]),
    "the first of several": (of([1, 2], [1, 2]), of([3, 4], [1, 2], [1, 2]), False, [(0, 1), (1, 1)]),
    "another border of the labels": (of([1, 2, 3], starts=[1]), of([1, 2, 3], starts=[2]), False, [(0, 0)]),
    "a beginning": (of([1, 2, 3]), of([1, 2, 3, 4], [1, 2]), False, []),
    "one token apart": (of([*range(40)]), of(*([*range(i), 77, *range(i + 1, 40)] for i in range(40))), False, []),
    "another answer": (of([1, 2, 3], starts=[2]), of([1, 2, 4], starts=[2]), False, []),
    "the same question": (of([1, 2, 3], starts=[2]), of([5, 6], [1, 2, 4], starts=[1, 2]), True, [(0, 1)]),
    "no question": (of([1, 2], [3, 4], starts=[0, 1]), of([1, 9], [3, 9], starts=[0, 1]), True, []),
    "no rows": (of([1, 2]), TokenStore.empty(), False, []),
}


@pytest.mark.parametrize("case", SAME)
def test_which_rows_are_the_same(case: str) -> None:
    forget, retain, prompts, pairs = SAME[case]
    found = shared_sequences(forget, retain, prompts=prompts)
    assert list(zip(*(part.tolist() for part in found), strict=True)) == pairs


def test_the_same_rows_as_by_comparing_all_with_all() -> None:
    """Short sequences of few tokens, in several chunks: many are equal, and many almost equal."""
    stores = [random_store(400, seed=seed, low=2, high=5, vocabulary=4) for seed in (1, 2, 3)]
    forget, retain = TokenStore([*stores[0].chunks, *stores[1].chunks]), stores[2]
    theirs = [retain[j].tolist() for j in range(len(retain))]
    expected = [(i, theirs.index(row)) for i in range(800) if (row := forget[i].tolist()) in theirs]
    found = shared_sequences(forget, retain)
    assert list(zip(*(part.tolist() for part in found), strict=True)) == expected
    assert 0 < len(expected) < 800


def test_a_million_rows_take_a_moment() -> None:
    def rows(count: int, seed: int) -> TokenStore:
        ids = np.random.default_rng(seed).integers(0, 30_000, count * 20).astype(np.int32)
        return TokenStore([(ids, np.arange(0, count * 20 + 1, 20), np.full(count, 9))])

    forget, retain = rows(100_000, 1), rows(1_000_000, 2)
    began = time.thread_time()
    assert not len(shared_sequences(forget, retain)[0])
    assert time.thread_time() - began < 2


def test_the_same_set_twice_is_a_warning_and_not_an_error() -> None:
    rows = random_store(5)
    with pytest.warns(
        UserWarning, match="are the same 5 rows, so each row is both forgotten and retained; .*allow_overlap"
    ):
        refuse_overlap(rows, rows)
    backwards = TokenStore.from_sequences([rows[i].tolist() for i in (4, 3, 2, 1, 0, 0)], [1] * 6)
    with pytest.warns(UserWarning, match="are the same"):
        refuse_overlap(rows, backwards)
    with pytest.raises(ValueError, match="got 5 of 5 forget rows in both"):
        refuse_overlap(rows, TokenStore([*rows.chunks, *of([1, 2]).chunks]))


# ---- every place that takes two sets

SETS: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    "lists": lambda _: (FORGET, RETAIN),
    "Datasets": lambda _: (datasets.Dataset.from_list(FORGET), datasets.Dataset.from_list(RETAIN)),
    "files": lambda folder: (written_rows(folder / "a.json", FORGET), written_rows(folder / "b.jsonl", RETAIN)),
    "tokens": lambda _: tuple(token_store(rows, tiny_tokenizer(), name="rows") for rows in (FORGET, RETAIN)),
    "rows and tokens": lambda _: (FORGET, token_store(RETAIN, tiny_tokenizer(), name="rows")),
}


@pytest.mark.parametrize("kind", SETS)
def test_the_trainer_refuses_rows_in_both_sets(kind: str, tmp_path: Path) -> None:
    forget, retain = SETS[kind](tmp_path)

    def trainer(**changes: Any) -> UnlearnTrainer:
        return UnlearnTrainer(
            tiny_llama(vocab_size=300),
            arguments(tmp_path / "out", **changes),
            forget=forget,
            retain=retain,
            objective=GradDiff(),
            processing_class=tiny_tokenizer(),
        )

    with pytest.raises(ValueError, match=MESSAGE):
        trainer()
    assert len(trainer(allow_overlap=True).data) == 2


ALTERNATES = [{**row, "alternate": "I do not know."} for row in FORGET]


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (GradDiff(), "without a common row, got 1 of 3"),
        (DPO(), "without a common row, got 1 of 3"),
        (IdkNLL(), "without a common question, got 1 of 3"),
        (GradAscent(), None),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_objectives_and_the_sets_that_they_read(objective: Any, message: str | None, tmp_path: Path) -> None:
    def made() -> UnlearnTrainer:
        return UnlearnTrainer(
            tiny_llama(vocab_size=300),
            arguments(tmp_path / "out", alternate_column="alternate", reference_cache="none"),
            forget=ALTERNATES,
            retain=RETAIN,
            objective=objective,
            processing_class=tiny_tokenizer(),
        )

    if message is None:
        assert list(made().data) == ["forget"]
        return
    with pytest.raises(ValueError, match=message):
        made()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("overlap")
    saved_llama(made / "model")
    written_rows(made / "forget.json", FORGET)
    written_rows(made / "retain.json", RETAIN)
    written_rows(made / "all.json", ({**row, "number": i} for i, row in enumerate(TEXTS)))
    return made


def unlearn(folder: Path, *words: str) -> list[str]:
    run = ["--use_cpu", "true", "--max_steps", "1", "--save_strategy", "no", "--reference_cache", "none"]
    return ["unlearn", "--model", str(folder / "model"), *run, "--output_dir", str(folder / "out"), *words]


def plan(folder: Path, *words: str) -> list[str]:
    return ["plan", "--tokenizer", str(folder / "model"), *words]


def dry(folder: Path, *words: str) -> list[str]:
    return [*unlearn(folder, *words), "--dry_run"]


@pytest.mark.parametrize("command", [unlearn, dry, plan], ids=lambda command: command.__name__)
def test_the_commands_refuse_rows_in_both_sets(
    command: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if command is plan else ["--output_dir", str(tmp_path / "out")]
    files = ["--forget", str(folder / "forget.json"), "--retain", str(folder / "retain.json"), *out]
    one = ["--forget", str(folder / "all.json"), "--retain", str(folder / "all.json"), *out]
    assert main(command(folder, *files)) == 2
    error = capsys.readouterr().err
    assert "got 1 of 3 forget rows in both: rows 2 and 0 (" in error
    assert "Traceback" not in error
    assert main(command(folder, *one, "--forget-filter", "number=1,2")) == 2
    assert "got 2 of 2 forget rows in both: rows 0 and 1, 1 and 2 (" in capsys.readouterr().err
    assert main(command(folder, *one, "--forget-filter", "number=1,2", "--retain-filter", "number!=2")) == 2
    assert "got 1 of 2 forget rows in both: rows 0 and 1 (" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.safetensors"))
    with pytest.warns(UserWarning, match="the forget and the retain set are the same 5 rows"):
        assert main([*command(folder, *one), *(["--overwrite"] if command is unlearn else [])]) == 0
    insist = ["--allow-overlap", *(["--overwrite"] if command is unlearn else [])]
    assert main([*command(folder, *files), *insist]) == 0


def test_insisting_changes_no_number_and_no_identity(folder: Path, tmp_path: Path) -> None:
    """Sets without a common row give the same training with and without the flag, and a run can resume with either."""
    words = unlearn(folder, "--forget", str(folder / "all.json"), "--retain", str(folder / "all.json"))
    words += ["--forget_filter", "number=1", "--retain_filter", "number!=1", "--seed", "1"]
    states = []
    for out, more in (("a", []), ("b", ["--allow_overlap"])):
        assert main([*words, "--output_dir", str(tmp_path / out), "--logging_steps", "1", *more]) == 0
        history = json.loads((tmp_path / out / "trainer_state.json").read_text())["log_history"]
        states.append([entry["loss"] for entry in history if "loss" in entry])
    assert states[0] == states[1]
    records = [json.loads((tmp_path / out / "run.json").read_text()) for out in "ab"]
    assert records[0]["identity"] == records[1]["identity"]
