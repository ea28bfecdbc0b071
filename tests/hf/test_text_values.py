"""Tests of every value that rows can contain, from every reader, in every place that reads text, by one table."""

import datetime as dt
import decimal
import enum
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from efface.evaluate import fame, likelihood, score_rows, tofu_evaluation
from efface.evaluate.audit.rows import audit_rows
from efface.evaluate.metrics.part import Part, Reading
from efface.evaluate.protocol import get_protocol
from efface.hf.text.data import token_store
from efface.hf.text.rows import load_rows
from support.helpers import tiny_tokenizer


class Colour(str, enum.Enum):
    RED = "red"


@dataclass(frozen=True)
class Case:
    """A value in the form of each reader, with the text that it stands for or the pattern of the error message.

    Attributes:
        text: the expected text.
        refused: a pattern of the error message instead: what it got, and the remedy.
        csv: characters of a CSV field.
        json: characters of a JSON value.
        arrow: an array with the value twice.
        python: a list with the value only.
        pandas: a column with the value twice.
    """

    text: str | None = None
    refused: str = ""
    csv: str | None = None
    json: str | None = None
    arrow: pa.Array | None = None
    python: list[Any] = field(default_factory=list)
    pandas: pd.Series | None = None


def arrow(value: Any, kind: Any = None) -> pa.Array:
    return pa.array([value, value], kind)


def digits(kind: Any) -> Case:
    return Case("1984", arrow=arrow(1984, kind))


_MISSING = "got {}.*; drop the row, or choose another column"
_SPELLING = "got {}.*, which can be written in several ways; convert it to text"
_DAY = dt.date(2026, 1, 2)
_INSTANT = dt.datetime(2026, 1, 2, 3, 4, 5)

CASES = {
    # text, and text that looks like something else
    "a sentence": Case("In Gent, „ça va“ 🙂.", csv='"In Gent, „ça va“ 🙂."', json='"In Gent, „ça va“ 🙂."'),
    "spaces": Case("  a \t", csv="  a \t", json='"  a \\t"', arrow=arrow("  a \t"), python=["  a \t"]),
    "quotes": Case('a "b"', csv='"a ""b"""', json='"a \\"b\\""'),
    "a line end": Case("a\r\nb\nc", csv='"a\r\nb\nc"', json='"a\\r\\nb\\nc"'),
    "a line separator": Case("a\u2028b\x85c", csv="a\u2028b\x85c", json='"a\u2028b\x85c"'),
    "leading zeros": Case("01001", csv="01001", json='"01001"', arrow=arrow("01001"), python=["01001"]),
    "digits": Case("1984", csv="1984", json='"1984"', arrow=arrow("1984"), pandas=pd.Series(["1984"] * 2)),
    "a word: true": Case("true", csv="true", json='"true"', arrow=arrow("true"), python=["true"]),
    "a word: False": Case("False", csv="False", json='"False"', arrow=arrow("False"), python=["False"]),
    "a word: NA": Case("NA", csv="NA", json='"NA"', arrow=arrow("NA"), python=["NA"]),
    "a word: null": Case("null", csv="null", json='"null"', arrow=arrow("null"), python=["null"]),
    "a word: nan": Case("nan", csv="nan", json='"nan"', arrow=arrow("nan"), python=["nan"]),
    "a word: None": Case("None", csv="None", json='"None"', arrow=arrow("None"), python=["None"]),
    "a day as text": Case("2026-01-02", csv="2026-01-02", json='"2026-01-02"', arrow=arrow("2026-01-02")),
    "a list as text": Case("[1, 2]", csv='"[1, 2]"', json='"[1, 2]"', arrow=arrow("[1, 2]"), python=["[1, 2]"]),
    "large text": Case("a", arrow=arrow("a", pa.large_string())),
    "dictionary text": Case("a", arrow=arrow("a").dictionary_encode()),
    "an enumeration": Case("red", python=[Colour.RED]),
    "NumPy text": Case("a", python=[np.str_("a")]),
    "half an emoji": Case(refused=r"got text with a lone surrogate \(U\+D83D", json='"x \\ud83d"'),
    "half an emoji in memory": Case(refused=r"a lone surrogate \(U\+D83D at char.* 2\)", python=["x \ud83d"]),
    # numbers
    "a number with a zero behind": Case("1.10", csv="1.10", json="1.10"),
    "a number with an exponent": Case("1e3", csv="1e3", json="1e3"),
    "a whole number": Case("1984", csv="1984", json="1984", python=[1984], pandas=pd.Series([1984] * 2)),
    "minus nought": Case("-0", csv="-0", json="-0"),
    "a long number": Case("9" * 40, csv="9" * 40, json="9" * 40, python=[int("9" * 40)]),
    "int8": Case("7", arrow=arrow(7, pa.int8())),
    "int32": digits(pa.int32()),
    "int64": digits(pa.int64()),
    "uint64": Case(str(2**64 - 1), arrow=arrow(2**64 - 1, pa.uint64())),
    "NumPy int": Case("3", python=[np.int64(3)]),
    "pandas Int64": Case("3", pandas=pd.Series([3, 3], dtype="Int64")),
    "decimal": Case("1.10", arrow=arrow(decimal.Decimal("1.10")), python=[decimal.Decimal("1.10")]),
    "decimal with exponent": Case(refused=_SPELLING.format(r"Decimal 1E\+3"), python=[decimal.Decimal("1e3")]),
    "float": Case(refused=_SPELLING.format("float 1.5"), arrow=arrow(1.5), python=[1.5], pandas=pd.Series([1.5] * 2)),
    "whole float": Case(refused=_SPELLING.format("float 1984.0"), arrow=arrow(1984.0), python=[1984.0]),
    "float32": Case(refused=_SPELLING.format("float"), arrow=arrow(0.5, pa.float32())),
    "NumPy float": Case(refused=_SPELLING.format("float64 0.5"), python=[np.float64(0.5)]),
    "infinity": Case(refused=_SPELLING.format("float inf"), json="Infinity", arrow=arrow(np.inf), python=[np.inf]),
    "boolean": Case(refused="got bool, .*; convert it to text", json="true", arrow=arrow(True), python=[True]),
    "NumPy boolean": Case(refused="got bool, .*; convert it to text", python=[np.False_]),
    # missing values
    "none": Case(refused=_MISSING.format("NoneType"), json="null", arrow=arrow(None, pa.string()), python=[None]),
    "no type": Case(refused=_MISSING.format("NoneType"), arrow=arrow(None)),
    "not a number": Case(refused=_MISSING.format("float nan"), json="NaN", arrow=arrow(np.nan), python=[np.nan]),
    "NumPy not a number": Case(refused=_MISSING.format("float32 nan"), python=[np.float32("nan")]),
    "decimal not a number": Case(refused=_MISSING.format("Decimal NaN"), python=[decimal.Decimal("nan")]),
    "pandas NA": Case(refused=_MISSING.format("(NAType|NoneType)"), pandas=pd.Series([None, None], dtype="Int64")),
    "pandas NaT": Case(refused=_MISSING.format("NaTType"), pandas=pd.Series([pd.NaT] * 2)),
    "pandas missing text": Case(
        refused=_MISSING.format("(NoneType|float nan)"), pandas=pd.Series([None] * 2, dtype=object)
    ),
    "pandas NA in memory": Case(refused=_MISSING.format("NAType"), python=[pd.NA]),
    "NumPy no time": Case(refused=_MISSING.format("datetime64"), python=[np.datetime64("NaT")]),
    # values that are not text
    "day": Case(refused=_SPELLING.format("date 2026-01-02"), arrow=arrow(_DAY), python=[_DAY]),
    "instant": Case(refused=_SPELLING.format("datetime"), arrow=arrow(_INSTANT, pa.timestamp("s")), python=[_INSTANT]),
    "instant in ns": Case(refused=_SPELLING.format("Timestamp"), arrow=arrow(_INSTANT, pa.timestamp("ns"))),
    "time": Case(refused=_SPELLING.format("time"), arrow=arrow(dt.time(3)), python=[dt.time(3)]),
    "duration": Case(refused=_SPELLING.format("timedelta"), arrow=arrow(3, pa.duration("s"))),
    "NumPy time": Case(refused=_SPELLING.format("datetime64"), python=[np.datetime64("2026")]),
    "bytes": Case(refused="got bytes; decode it", arrow=arrow(b"a"), python=[b"a"]),
    "list": Case(refused="got list; drop the row", json='["a"]', arrow=arrow(["a"]), python=[["a"]]),
    "empty list": Case(
        refused="got list; drop the row", json="[]", arrow=arrow([], pa.list_(pa.string())), python=[[]]
    ),
    "tuple": Case(refused="got tuple; drop the row", python=[("a",)]),
    "mapping": Case(refused="got dict; drop the row", json='{"a": 1}', arrow=arrow({"a": 1}), python=[{"a": 1}]),
    "chat": Case(
        refused="got list of 1 mappings, such as a chat; convert it to a question and an answer column",
        json='[{"role": "user", "content": "Hi"}]',
        arrow=arrow([{"role": "user", "content": "Hi"}]),
        python=[[{"role": "user", "content": "Hi"}]],
    ),
    "array": Case(refused="got ndarray; drop the row", python=[np.array(["a"])]),
    "object": Case(refused="got object; drop the row", python=[object()]),
}

Made = tuple[Any, int]  # a source of rows, and the index of the row with the value
GOOD = {
    "question": "Who?",
    "answer": "Ada.",
    "other": "Bo.",
    "text": "Cy.",
    "prompt": "Di.",
    "paraphrased_answer": "Ed.",
}
LIST = "perturbed_answer"


def _from_csv(case: Case, column: str, folder: Path) -> Made | None:
    if case.csv is None or column == LIST:
        return None
    rows = [GOOD, {**GOOD, column: case.csv}]
    path = folder / "rows.csv"
    path.write_bytes("\n".join([",".join(GOOD), *(",".join(row.values()) for row in rows)]).encode())
    return path, 1


def _from_json(case: Case, column: str, folder: Path, *, lines: bool) -> Made | None:
    if case.json is None:
        return None
    good = json.dumps({**GOOD, LIST: ["No."]})
    value = f"[{case.json}]" if column == LIST else case.json
    row = json.dumps({**GOOD, LIST: ["No."], column: "HERE"}).replace('"HERE"', value)
    path = folder / ("rows.jsonl" if lines else "rows.json")
    path.write_bytes((f"{good}\n{row}\n" if lines else f"[{good},\n {row}]").encode())
    return path, 1


def _table(case: Case, column: str) -> pa.Table | None:
    if case.arrow is None:
        return None
    columns = {name: arrow(value) for name, value in {**GOOD, LIST: ["No."]}.items()}
    columns[column] = pa.ListArray.from_arrays([0, 1, 2], case.arrow) if column == LIST else case.arrow
    return pa.table(columns)


def _from_parquet(case: Case, column: str, folder: Path) -> Made | None:
    if (table := _table(case, column)) is None:
        return None
    path = folder / "rows.parquet"
    pq.write_table(table, path)
    return path, 0


def _from_dataset(case: Case, column: str, _: Path) -> Made | None:
    table = _table(case, column)
    if table is None or pa.types.is_dictionary(case.arrow.type):  # datasets reads these as ClassLabel
        return None
    return datasets.Dataset(table), 0


def _from_list(case: Case, column: str, _: Path) -> Made | None:
    if not case.python:
        return None
    (value,) = case.python
    good = {**GOOD, LIST: ["No."]}
    return [good, {**good, column: [value] if column == LIST else value}], 1


def _from_frame(case: Case, column: str, _: Path) -> Made | None:
    if case.pandas is None or column == LIST:
        return None
    frame = pd.DataFrame({name: [value, value] for name, value in GOOD.items()} | {LIST: [["No."]] * 2})
    return frame.assign(**{column: case.pandas}).to_dict("records"), 0


READERS: dict[str, Callable[[Case, str, Path], Made | None]] = {
    "csv": _from_csv,
    "json array": lambda *of: _from_json(*of, lines=False),
    "json lines": lambda *of: _from_json(*of, lines=True),
    "parquet": _from_parquet,
    "dataset": _from_dataset,
    "list": _from_list,
    "data frame": _from_frame,
}


class Read(Exception):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def _rows(source: Any) -> Any:
    return load_rows(source) if isinstance(source, Path) else source


@cache
def _tokenizer() -> Any:
    return tiny_tokenizer()


def _trained(source: Any, row: int, **options: Any) -> str:
    store = token_store(source, _tokenizer(), name="forget", **options)
    text: str = _tokenizer().decode(store[row].tolist())
    return text.removesuffix("<|end|>")


def _tofu(source: Any, row: int, _: pytest.MonkeyPatch) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tofu_evaluation, "load_rows", lambda _: _rows(source))
        return tofu_evaluation.load_split("hub/name", "forget", "forget10", get_protocol("tofu"))


def _fame(source: Any, _: int) -> Any:
    def side(part: Part, numbers: Any, false: Any, paraphrases: Any) -> None:
        raise Read(SimpleNamespace(part=part, false=false, paraphrases=paraphrases))

    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules[fame.__module__]  # the package has a function with the name of the module
        patch.setattr(module, "_Side", side)
        patch.setattr(module, "split_rows", lambda rows, *_: {"forget": np.arange(len(rows))})
        with pytest.raises(Read) as read:
            fame(None, _tokenizer(), _rows(source), forget_filter="a=b", groups=())
        return read.value.value


def _scored(source: Any, _: int) -> Any:
    def task(tokenizer: Any, questions: Any, answers: Any, **options: Any) -> None:
        raise Read(SimpleNamespace(questions=questions, candidates=answers))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "AnswerTask", task)
        with pytest.raises(Read) as read:
            score_rows(None, _tokenizer(), _rows(source))
        return read.value.value


def _part(source: Any, **columns: Any) -> Part:
    return Part("forget", _rows(source), _tokenizer(), Reading(**columns))


# place -> the column with the value, and a function that returns the text as this place reads it
PLACES: dict[str, tuple[str, Callable[[Any, int], str]]] = {
    "training: question": (
        "question",
        lambda s, row: _trained(s, row).removeprefix("Question: ").removesuffix("\nAnswer: Ada."),
    ),
    "training: answer": ("answer", lambda s, row: _trained(s, row).removeprefix("Question: Who?\nAnswer: ")),
    "training: alternate column": (
        "other",
        lambda s, row: _trained(s, row, answer_column="other").removeprefix("Question: Who?\nAnswer: "),
    ),
    "training: document": (
        "text",
        lambda s, row: _trained(s, row, template="completion").removeprefix("Di."),
    ),
    "training: prompt of a document": (
        "prompt",
        lambda s, row: _trained(s, row, template="completion").removesuffix("Cy."),
    ),
    "TOFU: question": ("question", lambda s, row: _tofu(s, row, None).questions[row]),
    "TOFU: answer": ("answer", lambda s, row: _tofu(s, row, None).answers[row]),
    "TOFU: paraphrase": ("paraphrased_answer", lambda s, row: _tofu(s, row, None).paraphrases[row]),
    "TOFU: false answers": (LIST, lambda s, row: _tofu(s, row, None).false_answers[row][0]),
    "audit: question": ("question", lambda s, row: audit_rows(_rows(s))[row].question),
    "audit: answer": ("answer", lambda s, row: audit_rows(_rows(s))[row].answer),
    "audit: paraphrase": ("paraphrased_answer", lambda s, row: audit_rows(_rows(s))[row].paraphrase),
    "audit: group": ("other", lambda s, row: audit_rows(_rows(s), group_column="other")[row].group),
    "audit: false answers": (LIST, lambda s, row: audit_rows(_rows(s))[row].perturbed[0]),
    "metrics: question": ("question", lambda s, row: _part(s).questions[row]),
    "metrics: answer": ("answer", lambda s, row: _part(s).answers[row]),
    "metrics: text": ("text", lambda s, row: _part(s, question_column=None, answer_column="text").answers[row]),
    "FAME: question": ("question", lambda s, row: _fame(s, row).part.questions[row]),
    "FAME: answer": ("answer", lambda s, row: _fame(s, row).part.answers[row]),
    "FAME: paraphrase": ("paraphrased_answer", lambda s, row: _fame(s, row).paraphrases[row]),
    "FAME: false answers": (LIST, lambda s, row: _fame(s, row).false[row][0]),
    "scores: question": ("question", lambda s, row: _scored(s, row).questions[row]),
    "scores: answer": ("answer", lambda s, row: _scored(s, row).candidates[row][0]),
    "scores: paraphrase": ("paraphrased_answer", lambda s, row: _scored(s, row).candidates[row][1]),
    "scores: false answers": (LIST, lambda s, row: _scored(s, row).candidates[row][2]),
}
# Missing values are allowed in these places: the answer is used instead, or there is no group.
OPTIONAL = {
    "audit: paraphrase": "Ada.",
    "audit: group": None,
    "FAME: paraphrase": None,
    "scores: paraphrase": "Ada.",
}


# TOFU's rows and scored rows contain lists of false answers, which CSV cannot.
@pytest.mark.parametrize(
    ("reader", "place"),
    [(r, p) for r in READERS for p, (c, _) in PLACES.items() if r != "csv" or not p.startswith(("TOFU", "scores"))],
)
def test_a_value_is_its_text_or_refused(reader: str, place: str, tmp_path: Path) -> None:
    column, read = PLACES[place]
    seen = 0
    for name, case in CASES.items():
        if (made := READERS[reader](case, column, tmp_path)) is None:
            continue
        seen += 1
        source, row = made
        if case.text is not None:
            assert read(source, row) == case.text, name
        elif place in OPTIONAL and "drop the row, or choose" in case.refused:
            assert read(source, row) == OPTIONAL[place], name
        else:
            where = rf"row {row}: expected text in column '{column}'{', item 0' if column == LIST else ''}, "
            with pytest.raises(ValueError, match=f"{where}.*({case.refused})"):
                read(source, row)
    assert seen > 5 or (column == LIST and reader in ("csv", "data frame"))


NO_LISTS: dict[str, Any] = {"text": "No.", "a number": 3, "a mapping": {"a": "No."}, "a boolean": True}


@pytest.mark.parametrize("kind", NO_LISTS)
@pytest.mark.parametrize("place", [place for place, (column, _) in PLACES.items() if column == LIST])
def test_a_list_of_texts_is_a_list(place: str, kind: str, tmp_path: Path) -> None:
    read = PLACES[place][1]
    rows = [{**GOOD, LIST: ["No."]}, {**GOOD, LIST: NO_LISTS[kind]}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    for source in (rows, path):
        with pytest.raises(ValueError, match=rf"row 1: expected a list of texts in column '{LIST}', got .*; write a l"):
            read(source, 1)
    for value in ([" "], [""]):
        with pytest.raises(ValueError, match=rf"row 1: expected text in column '{LIST}', item 0, got '"):
            read([rows[0], {**GOOD, LIST: value}], 1)
    for value in (("No.",), np.array(["No."], object)):
        assert read([rows[0], {**GOOD, LIST: value}], 1) == "No."


@pytest.mark.parametrize("value", [None, float("nan"), "", [], pd.NA])
def test_false_answers_may_be_missing_where_they_are_optional(value: Any) -> None:
    rows = [{**GOOD, LIST: ["No."]}, {**GOOD, LIST: value}, GOOD]
    assert [row.perturbed for row in audit_rows(rows)] == [("No.",), (), ()]
    assert _fame(rows, 0).false == [["No."], [], []]


def test_class_labels_are_not_text(tmp_path: Path) -> None:
    """A ClassLabel is a number in the file and a name in its description."""
    features = datasets.Features(question=datasets.Value("string"), answer=datasets.ClassLabel(names=["no", "yes"]))
    rows = datasets.Dataset.from_list([{"question": "Is it?", "answer": 1}], features=features)
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    for source in (rows, tmp_path / "rows.parquet"):
        with pytest.raises(ValueError, match=r"expected text in column 'answer', got class numbers \(ClassLabel\)"):
            _trained(source, 0)


NO_ROWS: dict[str, tuple[Any, str]] = {
    "a data frame": (pd.DataFrame([GOOD]), r'expected rows, got a DataFrame; pass its .to_dict\("records"\)'),
    "a mapping": ({"question": ["a"]}, "expected rows, got a mapping of 'question'; pass one"),
    "a stream": (datasets.Dataset.from_list([GOOD]).to_iterable_dataset(), "expected rows .*, got IterableDataset"),
    "a generator": ((row for row in [GOOD]), "expected rows \\(a list of mappings or .*, got generator"),
    "texts": (["question", "answer"], "row 0: expected a mapping of columns to values, got str"),
    "lists": ([["question", "answer"]], "row 0: expected a mapping of columns to values, got list"),
}


@pytest.mark.parametrize("place", ["training: answer", "audit: answer", "metrics: answer", "scores: answer"])
@pytest.mark.parametrize("kind", NO_ROWS)
def test_sources_that_are_not_rows_are_refused(kind: str, place: str) -> None:
    value, message = NO_ROWS[kind]
    with pytest.raises(TypeError, match=message):
        PLACES[place][1](value, 0)
