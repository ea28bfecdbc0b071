"""The rows that TOFU's evaluation asks about, from a folder or from the Hub."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from efface.evaluate.protocol import Protocol
from efface.hf.text.rows import Rows, load_rows, text_lists, texts

HUB = "locuslab/TOFU"
_FILES = {
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
_SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class TofuRows:
    """Rows of one split; every list is as long as ``questions``.

    Attributes:
        source: of the rows, for messages.
        questions: what is asked.
        answers: the true answers.
        paraphrases: another wording of each, which the truth ratio is of; None where it is of the answer itself.
        false_answers: of each row, equally many.
    """

    source: str
    questions: list[str]
    answers: list[str]
    paraphrases: list[str] | None
    false_answers: list[list[str]]

    def candidates(self) -> list[list[str]]:
        """Return all answers of each row: the true one, its paraphrase if there is one, the false ones."""
        if self.paraphrases is None:
            return [[answer, *false] for answer, false in zip(self.answers, self.false_answers, strict=True)]
        rows = zip(self.answers, self.paraphrases, self.false_answers, strict=True)
        return [[answer, paraphrase, *false] for answer, paraphrase, false in rows]


def load_split(data: str | Path | None, split: str, forget_split: str, protocol: Protocol) -> TofuRows:
    """Return the rows of "forget", "retain", "real_authors" or "world_facts".

    TOFU's ``*_perturbed`` files hold question and answer of the plain ones, so they are all that is read.

    Args:
        data: a folder with TOFU's files, a data set on the Hub with its configurations, or None for TOFU's own.
        split: which of the four.
        forget_split: such as "forget10".
        protocol: how many of them.

    Raises:
        FileNotFoundError: no such folder, or none of the split's names in it.
        ValueError: a missing column, a value that has no text, a row without an answer or with another number of false
            ones.
    """
    name = f"{forget_split}_perturbed" if split == "forget" else _FILES[split]
    source = _source(data, name)
    rows: Rows = load_rows(source)
    wanted = range(len(rows) if protocol.rows is None else min(protocol.rows, len(rows)))
    if not wanted:
        raise ValueError(f"{source}: expected rows to evaluate, got none")
    numbers = np.arange(len(wanted))
    questions, answers = texts(rows, "question", source, numbers), texts(rows, "answer", source, numbers)
    false_answers = text_lists(rows, "perturbed_answer", source, numbers=numbers)
    paraphrases = texts(rows, "paraphrased_answer", source, numbers) if split in ("forget", "retain") else None
    counts = {len(false) for false in false_answers}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"{source}, 'perturbed_answer': expected a list of equally many false answers in every row, got lengths "
            f"{sorted(counts)}"
        )
    result = TofuRows(source, questions, answers, paraphrases, false_answers)
    for row, candidates in enumerate(result.candidates()):
        for text in [result.questions[row], *candidates]:
            _check(text, row, source)
    return result


def _check(text: str, row: int, source: str) -> None:
    if not text.strip():
        raise ValueError(f"{source}, row {row}: expected a question and answers of text, got {text!r}; drop the row")


def _source(data: str | Path | None, name: str) -> str:
    folder = Path(data or HUB).expanduser()
    if not folder.is_dir():
        if data is not None and str(data).startswith((".", "/", "~")):  # must not become a search on the Hub
            raise FileNotFoundError(f"data folder {str(data)!r} does not exist; check the path")
        return f"{data or HUB}:{name}:train"
    for suffix in _SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return str(folder / f"{name}{suffix}")
    there = sorted(path.stem for suffix in _SUFFIXES for path in folder.glob(f"*_perturbed{suffix}"))
    raise FileNotFoundError(
        f"data folder {str(data)!r}: expected {name}.json, as TOFU's, got {', '.join(there) or 'no *_perturbed file'}; "
        "choose another --split, or another --data"
    )
