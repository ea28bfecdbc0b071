"""The demo's three sets: what the full model learns, what it shall forget, what it shall keep."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efface.cli.demo.authors import ROWS_PER_AUTHOR, make_authors
from efface.hf.data import load_rows

Rows = Sequence[dict[str, Any]]

TOFU_ROWS_PER_AUTHOR = 20
# TOFU has perturbed answers for the authors of its forget splits and for the first 20 authors, which are retain ones.
_TOFU_FORGET_SPLITS = {2: "forget01", 10: "forget05", 20: "forget10"}
_TOFU_RETAIN_AUTHORS = 20


@dataclass(frozen=True)
class DemoData:
    """Rows with question, answer, paraphrased_answer and perturbed_answer."""

    name: str
    forget: Rows
    retain: Rows

    @property
    def full(self) -> Rows:
        """Everything."""
        return [*self.retain, *self.forget]

    def texts(self) -> Iterator[str]:
        """Yield every text, for a tokenizer."""
        for row in self.full:
            yield from (row["question"], row["answer"], row["paraphrased_answer"], *row["perturbed_answer"])


def fictitious(authors: int, forget_authors: int) -> DemoData:
    """Return made-up authors; the last ``forget_authors`` of them are to be forgotten."""
    if not 1 <= forget_authors < authors:
        raise ValueError(
            f"`--forget-authors`: expected 1 .. {authors - 1} (fewer than --authors), got {forget_authors}"
        )
    rows = make_authors(authors)
    border = (authors - forget_authors) * ROWS_PER_AUTHOR
    return DemoData(f"{authors} fictitious authors", forget=rows[border:], retain=rows[:border])


def tofu(folder: str | Path, authors: int, forget_authors: int) -> DemoData:
    """Return TOFU's own rows: its last ``forget_authors`` to forget, its first authors to keep.

    Raises:
        FileNotFoundError: a folder without TOFU's files.
        ValueError: a number of authors for which TOFU has no perturbed answers.
    """
    folder = Path(folder)
    if forget_authors not in _TOFU_FORGET_SPLITS:
        known = ", ".join(f"{count} ({split})" for count, split in _TOFU_FORGET_SPLITS.items())
        raise ValueError(f"`--forget-authors`: TOFU has forget splits of {known} authors, got {forget_authors}")
    retain_authors = authors - forget_authors
    if not 1 <= retain_authors <= _TOFU_RETAIN_AUTHORS:
        low, high = forget_authors + 1, forget_authors + _TOFU_RETAIN_AUTHORS
        raise ValueError(
            f"`--authors`: expected {low} .. {high}, of whom {forget_authors} are forgotten (TOFU has perturbed "
            f"answers for {_TOFU_RETAIN_AUTHORS} retain authors), got {authors}"
        )
    split = _TOFU_FORGET_SPLITS[forget_authors]
    forget = list(load_rows(folder / f"{split}_perturbed.json"))
    retain = list(load_rows(folder / "retain_perturbed.json"))[: retain_authors * TOFU_ROWS_PER_AUTHOR]
    return DemoData(f"TOFU, {authors} authors", forget=[*map(dict, forget)], retain=[*map(dict, retain)])
