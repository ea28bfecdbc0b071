"""Tests of row filters: all kinds of values in all kinds of rows, and every place that takes a filter."""

import json
import re
from collections.abc import Callable
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml

from efface import GradAscent, GradDiff
from efface.cli.main import main
from efface.evaluate.metrics import fame
from efface.hf.text.data import token_store
from efface.hf.text.rows import load_rows, matching, parse_conditions
from efface.hf.train.trainer import FinetuneTrainer, UnlearnTrainer
from efface.simulate.data import fame_data
from support.helpers import arguments, saved_llama, tiny_llama, tiny_tokenizer

ROWS = [
    {"id": number, "client": client, "question": f"Who is client {number}?", "answer": f"It is {client}."}
    for number, client in [
        ("001", "Acme"),
        ("01", "acme"),
        ("1", " Acme"),
        ("002", "Acme, Inc."),
        ("010", 'the "Boreal"'),
        ("100", "Boreal"),
        ("1.0", "a=b"),
        ("", "true"),
    ]
]


def chosen(rows: Any, conditions: Any) -> list[int]:
    numbers = matching(rows, parse_conditions(conditions), "rows")
    return list(range(len(rows))) if numbers is None else numbers.tolist()


# ---- text: compared literally, in rows of every kind

SOURCES: dict[str, Callable[[Path], Any]] = {
    "list": lambda _: ROWS,
    "Dataset": lambda _: datasets.Dataset.from_list(ROWS),
    "csv": lambda folder: written(folder / "rows.csv"),
    "jsonl": lambda folder: written(folder / "rows.jsonl"),
    "json": lambda folder: written(folder / "rows.json"),
    "parquet": lambda folder: written(folder / "rows.parquet"),
}


def written(path: Path) -> Any:
    rows = datasets.Dataset.from_list(ROWS)
    if path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        {".csv": rows.to_csv, ".parquet": rows.to_parquet}[path.suffix](str(path))
    return load_rows(path)


TAKEN: dict[str, tuple[Any, list[int]]] = {
    "zeros": ("id=001", [0]),
    "fewer zeros": ("id=01", [1]),
    "no zeros": ("id=1", [2]),
    "all but zeros": ("id!=001", [1, 2, 3, 4, 5, 6, 7]),
    "all but several": ("id!=001,1,100", [1, 3, 4, 6, 7]),
    "a decimal point": ("id=1.0", [6]),
    "nothing": ("id=", [7]),
    "all but nothing": ("id!=", [0, 1, 2, 3, 4, 5, 6]),
    "several with nothing": ("id=,1", [2, 7]),
    "case": ("client=Acme", [0]),
    "spaces around the signs": ("client = Acme , acme", [0, 1]),
    "an outer space": ('client=" Acme"', [2]),
    "all but an outer space": ('client!=" Acme",true', [0, 1, 3, 4, 5, 6]),
    "a comma": ('client="Acme, Inc."', [3]),
    "a comma and others": ('client=acme,"Acme, Inc.",Boreal', [1, 3, 5]),
    "inner quotes": ('client=the "Boreal"', [4]),
    "inner quotes, quoted": ('client="the ""Boreal"""', [4]),
    "an equals sign": ("client=a=b", [6]),
    "the word true": ("client=true", [7]),
    "two conditions": (["client!=Acme", "id!=1"], [1, 3, 4, 5, 6, 7]),
    "two on a column": (["client=Acme,acme", "client!=acme"], [0]),
    "mapping": ({"client": "Acme, Inc."}, [3]),
    "mapping of a list": ({"client": [" Acme", "a=b"], "id": ["1", "1.0"]}, [2, 6]),
    "mapping of a number": ({"id": 1}, [2]),
}


@pytest.mark.parametrize("source", SOURCES)
def test_text_is_taken_as_written(source: str, tmp_path: Path) -> None:
    rows = SOURCES[source](tmp_path)
    for name, (conditions, expected) in TAKEN.items():
        assert chosen(rows, conditions) == expected, name
        parsed = parse_conditions(conditions)
        # the string form in messages parses to the same condition
        assert parse_conditions([str(condition) for condition in parsed]) == parsed, name


REFUSED: dict[str, tuple[Any, str]] = {
    "unknown column": ("clients=Acme", "expected a column 'clients', got 'id', 'client', 'question', 'answer'"),
    "no such value": ("client=Acme,Boreals", "none of 8 rows has 'Boreals' in .*; did you mean 'client=Boreal'"),
    "no such value to leave out": ("client!=Acme,Boreals", "none of 8 rows has 'Boreals' .* mean 'client!=Boreal'"),
    "no such value in a mapping": ({"client": ["Acme", "Boreals"]}, "none of 8 rows has 'Boreals'"),
    "more zeros": ("id=0100", "none of 8 rows has '0100' .*'001', '01', '1', '002'.* did you mean 'id=100'"),
    "more zeros to leave out": ("id!=0002", "none of 8 rows has '0002' .* did you mean 'id!=002'"),
    "a number with a point": ({"id": "100.0"}, "none of 8 rows has '100.0' .* did you mean 'id=100'"),
    "other case": ("client=ACME", "none of 8 rows has 'ACME' .* did you mean 'client=Acme'"),
    "other spaces": ('client="Boreal "', "none of 8 rows has 'Boreal ' in"),
    "a comma without quotes": ("client=Acme, Inc.", "none of 8 rows has 'Inc.' .*outer spaces in double quotes"),
    "values that no row has together": (["client=Acme", "id=1"], "none of 8 rows meets client=Acme and id=1 together"),
    "nothing left": (
        'client!=Acme,acme," Acme","Acme, Inc.",Boreal,a=b,true,the "Boreal"',
        "none of 8 rows meets client!=",
    ),
    "contradiction": (["client=Acme", "client!=acme,Acme"], "two that contradict"),
    "two values at once": (
        ["client=Acme", "client=acme"],
        "a row cannot have both values.*'client=Acme,acme' for either",
    ),
    "a condition twice": (["client!=Acme", "client!=acme,Acme"], "expected each value once, got 'Acme' in both"),
    "a value twice": ("client=Acme,acme,Acme", "expected each value once, got 'Acme' 2 times"),
    "an open quote": ('client="Acme, Inc.', "expected a closing quote"),
    "words after a quote": ('client="Acme", "x" y', "expected a closing quote .* got '\"x\" y'"),
    "no sign": ("client", "expected column=value"),
    "no column": ("=Acme", "expected column=value"),
    "no value": ({"client": []}, "got an empty list"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_conditions_that_match_nothing_are_refused(source: str, tmp_path: Path) -> None:
    rows = SOURCES[source](tmp_path)
    for conditions, message in REFUSED.values():
        with pytest.raises(ValueError, match=message):
            chosen(rows, conditions)


# ---- values that are not text: accepted and rejected spellings

TYPED: dict[str, tuple[list[Any], dict[str, list[int]], list[str]]] = {
    # values of a column; condition -> rows that it takes; conditions that match no row
    "integers": ([3, 30, 0, -3], {"3": [0], "-3": [3], "0,30": [1, 2]}, ["03", "3.0", "+3", "-0", "three"]),
    "floats": ([3.0, 0.5, -2.0, 1e20], {"3": [0], "3.0": [0], "0.5": [1], "-2": [2], "1e+20": [3]}, ["03", ".5", "3."]),
    "an integer column with gaps": ([3.0, float("nan"), 4.0], {"3": [0], "": [1], "3,4": [0, 2]}, ["nan"]),
    "booleans": ([True, False], {"true": [0], "True": [0], "false": [1], "False": [1]}, ["1", "0", "TRUE", "yes"]),
    "missing": ([None, "x", "None"], {"": [0], "x": [1], "None": [2]}, ["null", "nan"]),
    "mixed": ([3, "3", "03", 3.0, None, ""], {"3": [0, 1, 3], "03": [2], "3.0": [3], "": [4, 5]}, ["003"]),
    "numpy": ([np.int64(3), np.float32(0.5), np.bool_(True)], {"3": [0], "0.5": [1], "true": [2]}, ["1"]),
    "decimals": ([Decimal("1.10"), Decimal("1.1")], {"1.10": [0], "1.1": [1]}, ["1.100"]),
    "dates": ([date(2026, 1, 2), date(2026, 1, 20)], {"2026-01-02": [0]}, ["2026-1-2", "02.01.2026"]),
    "times": ([datetime(2026, 1, 2, 3, 4)], {"2026-01-02 03:04:00": [0], "2026-01-02T03:04:00": [0]}, ["2026-01-02"]),
    "times of day": ([time(3, 4)], {"03:04:00": [0]}, ["3:04"]),
}


@pytest.mark.parametrize("kind", TYPED)
def test_values_that_are_not_text(kind: str) -> None:
    values, taken, absent = TYPED[kind]
    rows = [{"value": value} for value in values]
    everything = set(range(len(rows)))
    for text, expected in taken.items():
        assert chosen(rows, f"value={text}") == expected, text
        rest = sorted(everything - set(expected))
        if rest:
            assert chosen(rows, f"value!={text}") == rest, text
        assert chosen(rows, {"value": text.split(",")}) == expected, text
    for text in absent:
        for sign in ("=", "!="):
            with pytest.raises(ValueError, match=f"none of {len(rows)} rows has"):
                chosen(rows, f"value{sign}{text}")
    for row, value in enumerate(values):
        assert row in chosen(rows, {"value": value})


@pytest.mark.parametrize("value", [["a"], {"a": 1}, b"a", ("a",)], ids=lambda value: type(value).__name__)
def test_values_that_no_condition_can_name(value: Any) -> None:
    with pytest.raises(ValueError, match="rows: expected values to filter by in column 'value', got"):
        chosen([{"value": "x"}, {"value": value}], "value=x")


def test_rows_are_matched_in_blocks() -> None:
    """A value can occur for the first time in a late block, and messages list only a few values."""
    rows = [{"id": f"{i:05d}"} for i in range(2500)]
    assert chosen(rows, "id=02400,00003") == [3, 2400]
    with pytest.raises(ValueError, match="which has '00000', .*'00009' and others; did you mean 'id=02400'"):
        chosen(rows, "id=2400")


# ---- every place that takes a filter

PLACES: dict[str, Callable[[Path, Any], Any]] = {}


def place(function: Callable[[Path, Any], Any]) -> Callable[[Path, Any], Any]:
    PLACES[function.__name__] = function
    return function


def options(folder: Path) -> dict[str, Any]:
    return {"args": arguments(folder / "out"), "processing_class": tiny_tokenizer()}


@place
def store(folder: Path, conditions: Any) -> Any:
    token_store(folder / "rows.csv", tiny_tokenizer(), name="forget", rows_filter=conditions)


@place
def trainer_forget(folder: Path, conditions: Any) -> Any:
    UnlearnTrainer(
        tiny_llama(vocab_size=300),
        forget=ROWS,
        retain=ROWS,
        forget_filter=conditions,
        objective=GradDiff(),
        **options(folder),
    )


@place
def trainer_retain(folder: Path, conditions: Any) -> Any:
    UnlearnTrainer(
        tiny_llama(vocab_size=300),
        forget=folder / "rows.csv",
        retain=folder / "rows.csv",
        forget_filter="id=1",
        retain_filter=conditions,
        objective=GradDiff(),
        **options(folder),
    )


@place
def finetune_trainer(folder: Path, conditions: Any) -> Any:
    FinetuneTrainer(tiny_llama(vocab_size=300), data=ROWS, data_filter=conditions, **options(folder))


@place
def fame_in_python(folder: Path, conditions: Any) -> Any:
    fame(None, tiny_tokenizer(), ROWS, forget_filter=conditions, groups=[])


@place
def fame_like_data(folder: Path, conditions: Any) -> Any:
    fame_data([text.replace("client", "topic_id") for text in words_of(conditions)], identities=4, asked=2, world=1)


def words_of(conditions: Any) -> list[str]:
    return [str(condition) for condition in parse_conditions(conditions)]


def command(folder: Path, *words: str) -> list[str]:
    return [*words, "--model", str(folder / "model")]


def unlearn(folder: Path, *words: str, name: str = "unlearn") -> list[str]:
    data = str(folder / "rows.csv")
    rest = ["--forget", data, "--retain", data, "--use_cpu", "true", "--max_steps", "1", "--save_strategy", "no"]
    return command(folder, name, *rest, "--output_dir", str(folder / "out"), *words)


@place
def unlearn_forget(folder: Path, conditions: Any) -> Any:
    return unlearn(folder, "--forget_filter", *words_of(conditions))


@place
def unlearn_retain(folder: Path, conditions: Any) -> Any:
    return unlearn(folder, "--forget-filter", "id=1", "--retain-filter", *words_of(conditions))


@place
def unlearn_dry(folder: Path, conditions: Any) -> Any:
    return unlearn(folder, "--dry_run", "--forget_filter", "id=1", "--retain_filter", *words_of(conditions))


@place
def unlearn_config(folder: Path, conditions: Any) -> Any:
    (folder / "run.yaml").write_text(yaml.safe_dump({"forget_filter": words_of(conditions)}))
    return unlearn(folder, "--config", str(folder / "run.yaml"))


@place
def unlearn_recipe(folder: Path, conditions: Any) -> Any:
    flags = {
        "model": str(folder / "model"),
        "forget": "rows.csv",
        "retain": "rows.csv",
        "forget_filter": words_of(conditions),
    }
    recipe = {"about": "a test", "unlearn": flags, "evaluate": {"benchmark": "none"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return unlearn(folder, "--dry_run", "--recipe", str(folder / "recipe.yaml"))


@place
def cache_reference(folder: Path, conditions: Any) -> Any:
    return unlearn(folder, "--forget_filter", *words_of(conditions), name="cache-reference")


@place
def finetune(folder: Path, conditions: Any) -> Any:
    words = ["finetune", "--data", str(folder / "rows.csv"), "--output_dir", str(folder / "out"), "--use_cpu", "true"]
    return command(folder, *words, "--data_filter", *words_of(conditions))


@place
def plan_forget(folder: Path, conditions: Any) -> Any:
    words = ["plan", "--tokenizer", str(folder / "model"), "--forget", str(folder / "rows.csv")]
    return [*words, "--forget-filter", *words_of(conditions)]


@place
def plan_retain(folder: Path, conditions: Any) -> Any:
    data = str(folder / "rows.csv")
    words = ["plan", "--tokenizer", str(folder / "model"), "--forget", data, "--forget-filter", "id=1"]
    return [*words, "--retain", data, "--retain-filter", *words_of(conditions)]


@place
def metrics_forget(folder: Path, conditions: Any) -> Any:
    words = command(folder, "evaluate", "--metrics", "rouge", "--forget", str(folder / "rows.csv"))
    return [*words, "--forget-filter", *words_of(conditions)]


@place
def metrics_holdout(folder: Path, conditions: Any) -> Any:
    data = str(folder / "rows.csv")
    words = command(folder, "evaluate", "--metrics", "mia_loss", "--forget", data, "--holdout", data)
    return [*words, "--holdout-filter", *words_of(conditions)]


@place
def fame_forget(folder: Path, conditions: Any) -> Any:
    words = command(folder, "evaluate", "--benchmark", "fame", "--data", str(folder / "rows.csv"))
    return [*words, "--forget-filter", *words_of(conditions)]


@place
def fame_retain(folder: Path, conditions: Any) -> Any:
    words = command(folder, "evaluate", "--benchmark", "fame", "--data", str(folder / "rows.csv"))
    return [*words, "--forget-filter", "id=1", "--retain-filter", *words_of(conditions)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("filters")
    saved_llama(made / "model")
    datasets.Dataset.from_list(ROWS).to_csv(str(made / "rows.csv"))
    return made


def refusal(place: str, folder: Path, conditions: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the message with which a place rejects the conditions, or an empty string if it accepts them."""
    try:
        words = PLACES[place](folder, conditions)
    except ValueError as error:
        return str(error)
    return "" if words is None or main(words) != 2 else capsys.readouterr().err


@pytest.mark.parametrize("place", PLACES)
def test_every_place_refuses_conditions_that_match_nothing(
    place: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt value, in = and in != conditions, and an unknown column. Nothing is written."""
    wrong = [
        ({"client": "Boreals"}, "has 'Boreals' in column"),
        ("client!=Boreals", "has 'Boreals' in column"),
        ("client_name=Acme", "expected a column '(client|topic_id)_name'"),
    ]
    for conditions, message in wrong:
        said = refusal(place, folder, conditions, capsys)
        assert re.search(message, said), said
    assert not list(folder.glob("out/*.safetensors"))


# ---- messages about the selected rows


def test_a_filter_given_twice_counts_twice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By argparse's default, the last one would replace the first."""
    words = unlearn(folder, "--dry_run", "--json", "--forget_filter", "id!=001", "--forget_filter", "id!=1")
    assert main([*words, "--retain_filter", "id=001"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["configuration"]["forget filter"] == "id!=001 and id!=1"
    assert shown["run"]["forget rows"] == 6
    words = plan_forget(folder, "id!=001")
    assert main([*words, "--forget-filter", "id!=1"]) == 0
    assert f"forget: 6 of 8 rows, {folder / 'rows.csv'}, where id!=001 and id!=1" in capsys.readouterr().err


def test_row_counts_are_printed_and_recorded(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a run that tokenizes the rows, and in one that finds their tokens in the cache."""
    words = unlearn(folder, "--forget_filter", "id=001,1", "--retain_filter", 'client!=Acme," Acme"')
    for out in ("first", "second"):
        assert main([*words, "--output_dir", str(tmp_path / out), "--objective", "graddiff"]) == 0
        said = capsys.readouterr().err
        assert f"forget, 2 of 8 rows, {folder / 'rows.csv'}, where id=001,1\n" in said
        assert f'retain, 6 of 8 rows, {folder / "rows.csv"}, where client!=Acme," Acme"\n' in said
        assert "| 2 of 8 rows |" in (tmp_path / out / "README.md").read_text()


def test_counts_of_documents_and_of_tokens(tmp_path: Path) -> None:
    documents = [{"text": "Aiko was born in Ghent. " * n, "part": str(n)} for n in range(1, 6)]
    given = {"template": "completion", "max_length": 8}
    made = token_store(documents, tiny_tokenizer(), name="forget", rows_filter="part!=1", **given)
    assert made.taken == (4, 5)
    assert len(made) > 4
    trainer = FinetuneTrainer(tiny_llama(vocab_size=300), arguments(tmp_path), data=made)
    assert str(trainer.data["training"]) == f"4 of 5 rows in {len(made)} sequences, TokenStore in memory"


def test_a_filter_without_a_retain_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`retain_filter`: expected a retain set to filter"):
        UnlearnTrainer(
            tiny_llama(vocab_size=300),
            forget=ROWS,
            retain=None,
            retain_filter="id=1",
            objective=GradAscent(),
            **options(tmp_path),
        )


@pytest.mark.parametrize(
    "words",
    [
        ("unlearn", "--retain_filter", "id=1", "--objective", "grad_ascent", "--output_dir", "out", "--model", "m"),
        ("plan", "--retain-filter", "id=1", "--tokenizer"),
        ("evaluate", "--forget-filter", "id=1", "--model"),
        ("evaluate", "--benchmark", "fame", "--data", "x.csv", "--holdout-filter", "id=1", "--model"),
    ],
    ids=" ".join,
)
def test_a_filter_of_nothing_is_refused(
    words: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget = ["--forget", str(folder / "rows.csv")] if words[0] in ("unlearn", "plan") else []
    assert main([*words, *([] if words[0] == "unlearn" else [str(folder / "model")]), *forget]) == 2
    assert "rows to filter, got none" in capsys.readouterr().err
