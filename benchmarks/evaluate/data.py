"""Questions and the answers to score: TOFU's evaluation files where they are at hand, else made-up ones."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from benchmarks import tofu
from efface.simulate.teach import train_tokenizer

SPLITS = ("forget10_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")


@dataclass(frozen=True)
class Split:
    """A file's rows: the answer first, then its paraphrase if it has one, then the false answers."""

    name: str
    questions: list[str]
    answers: list[list[str]]


def splits(rows: int) -> tuple[list[Split], str]:
    """Return so many rows of each split, evenly spread over it, and what they are."""
    files = [tofu.FOLDER / f"{name}.json" for name in SPLITS]
    if not all(file.is_file() for file in files):
        return [_made_up(name, rows) for name in SPLITS], "made up"
    return [_read(file, rows) for file in files], f"TOFU {', '.join(SPLITS)}"


def tokenizer_of(data: list[Split], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer trained on the data."""
    return train_tokenizer(_texts(data), min(vocabulary, 8192))


def _texts(data: list[Split]) -> Iterator[str]:
    for split in data:
        yield from split.questions
        yield from chain.from_iterable(split.answers)


def _read(file: Path, count: int) -> Split:
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:: len(lines) // count][:count]]
    names = ("answer", "paraphrased_answer")
    answers = [[*(row[name] for name in names if name in row), *row["perturbed_answer"]] for row in rows]
    return Split(file.stem, [row["question"] for row in rows], answers)


def _made_up(name: str, rows: int) -> Split:
    questions = [f"What is the title of book {row} in {name}?" for row in range(rows)]
    ends = ("a river", "the hill", "a town by the sea", "the long and quiet years before the flood")
    answers = [[f"The title of book {row} is {end}." for end in ends] for row in range(rows)]
    return Split(name, questions, answers)
