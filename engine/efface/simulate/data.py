"""Data of a small-scale run: training, forget, retain and evaluation rows, and their files in TOFU's names and columns.

``forget.json`` and ``retain.json`` are the sets of the unlearning. ``*_perturbed.json`` of forget, retain, real_authors
and world_facts are the evaluation. ``train_retain.json`` and ``train_full.json`` are the training data of the two
models: the retain rows, real authors and world facts, and for the full model also the forget rows.

A model trained from scratch has no general knowledge, so real authors and world facts are part of its training data.
Model Utility then measures how much of them is left after unlearning. Paraphrases and false answers are used only in
the evaluation, never in training.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from efface.hf.text.rows import load_rows, matching, parse_conditions
from efface.simulate.authors import ROWS_PER_AUTHOR, make_authors
from efface.simulate.fame import LANGUAGES, fame_like, real_authors, world_facts, write_rows

Rows = Sequence[Mapping[str, Any]]

SPLIT = "forget"
TOFU_ROWS_PER_AUTHOR = 20
_TOFU_EVALUATED = 400  # number of TOFU's retain rows, from the first, that have false answers
_TOFU_SPLITS = {"forget01": 2, "forget05": 10, "forget10": 20}  # split -> authors; all their rows have false answers


@dataclass(frozen=True)
class SimulatedData:
    """The rows of a small-scale run, by role."""

    name: str  # description of the rows for the user
    forget: Rows  # with paraphrased and false answers
    retain: Rows  # all retain rows
    retain_asked: Rows = ()  # retain rows with paraphrased and false answers; empty if all have them
    real_authors: Rows = ()  # with false answers
    world_facts: Rows = ()  # with false answers

    def taught(self, name: str) -> Rows:
        """Return the training rows of the "retain" or the "full" model, without answers of the evaluation."""
        kept = [*self.retain, *self.real_authors, *self.world_facts]
        return _plain(kept if name == "retain" else [*kept, *self.forget])

    @property
    def files(self) -> dict[str, Rows]:
        """The rows that ``write`` writes: name of the file without suffix -> rows."""
        return {
            "forget": _plain(self.forget),
            "retain": _plain(self.retain),
            "forget_perturbed": self.forget,
            "retain_perturbed": self.retain_asked,
            "real_authors_perturbed": self.real_authors,
            "world_facts_perturbed": self.world_facts,
            "train_full": self.taught("full"),
            "train_retain": self.taught("retain"),
        }

    def texts(self) -> Iterator[str]:
        """Yield every question and answer, to train a tokenizer."""
        for row in (*self.forget, *self.retain, *self.retain_asked, *self.real_authors, *self.world_facts):
            yield from (row["question"], row["answer"], *row.get("perturbed_answer", ()))
            if "paraphrased_answer" in row:
                yield row["paraphrased_answer"]

    def write(self, folder: str | Path) -> Path:
        """Write the non-empty ``files`` as JSON lines into a folder, and return the folder."""
        folder = Path(folder)
        for name, rows in self.files.items():
            if rows:
                write_rows(rows, folder / f"{name}.json")
        return folder


def _plain(rows: Rows) -> Rows:
    evaluation = ("paraphrased_answer", "paraphrased_question", "perturbed_answer")
    return [{name: value for name, value in row.items() if name not in evaluation} for row in rows]


def tofu_data(
    folder: str | Path, split: str, *, forget_authors: int, retain_authors: int, asked: int, world: int
) -> SimulatedData:
    """Return TOFU's own rows: the last authors of a forget split, and the first authors of its retain split.

    Args:
        folder: folder with TOFU's files.
        split: forget01, forget05 or forget10.
        forget_authors: most authors to forget; the splits have 2, 10 and 20.
        retain_authors: number of authors to retain.
        asked: most retain rows to evaluate. With 0, the retain rows come from retain_perturbed and all are evaluated.
        world: most real authors, and most world facts.

    Raises:
        FileNotFoundError: a file of TOFU is missing in the folder.
        ValueError: an unknown split.
    """
    if split not in _TOFU_SPLITS:
        raise ValueError(f"`split`: expected one of {', '.join(_TOFU_SPLITS)}, got {split!r}")
    folder = Path(folder).expanduser()

    def read(name: str, first: int | None = None) -> Rows:
        return [] if first == 0 else [*map(dict, load_rows(folder / f"{name}.json"))][:first]

    forget = read(f"{split}_perturbed")[-forget_authors * TOFU_ROWS_PER_AUTHOR :]
    kept = f"retain{100 - int(split[-2:])}" if asked else "retain_perturbed"
    retain = read(kept, retain_authors * TOFU_ROWS_PER_AUTHOR)
    retain_asked = some(read("retain_perturbed", min(_TOFU_EVALUATED, len(retain))), asked) if asked else ()
    name = f"TOFU's {split}, {len(forget) // TOFU_ROWS_PER_AUTHOR} authors to forget, {retain_authors} to keep"
    others = read("real_authors_perturbed", world), read("world_facts_perturbed", world)
    return SimulatedData(name, forget, retain, retain_asked, *others)


def made_up_data(*, forget_authors: int, retain_authors: int, asked: int, world: int) -> SimulatedData:
    """Return made-up authors in place of TOFU's, and real authors and chemical elements in place of its other splits.

    Arguments as for ``tofu_data``.
    """
    rows = make_authors(forget_authors + retain_authors)
    border = retain_authors * ROWS_PER_AUTHOR
    name = f"made-up authors in place of TOFU's, {forget_authors} to forget, {retain_authors} to keep"
    others = some(real_authors(), world), some(world_facts(), world)
    return SimulatedData(name, rows[border:], rows[:border], some(rows[:border], asked), *others)


def fame_data(
    forget_filter: Sequence[str], *, identities: int, asked: int, world: int, languages: Sequence[str] = LANGUAGES
) -> SimulatedData:
    """Return made-up biographies in place of FAME's.

    Args:
        forget_filter: conditions such as ``topic_id=3``; rows that meet all of them are the forget set.
        identities: number of biographies.
        asked: most retain rows to evaluate.
        world: most real authors, and most world facts.
        languages: some of ``LANGUAGES``.

    Raises:
        ValueError: no row or every row meets the filter.
    """
    rows = fame_like(identities, languages=languages)
    numbers = matching(rows, parse_conditions(list(forget_filter)), "FAME-like rows")
    chosen = set(() if numbers is None else numbers.tolist())
    forget = [row for i, row in enumerate(rows) if i in chosen]
    retain = [row for i, row in enumerate(rows) if i not in chosen]
    if not forget or not retain:
        raise ValueError(
            f"`forget_filter`: expected a filter that some rows meet and others do not, got {', '.join(forget_filter)}"
        )
    name = f"FAME-like, {identities} made-up identities in {', '.join(languages)}, forgetting {' '.join(forget_filter)}"
    others = some(real_authors(languages), world), some(world_facts(languages), world)
    return SimulatedData(name, forget, retain, some(retain, asked), *others)


def some(rows: Rows, count: int) -> Rows:
    """Return at most ``count`` rows at equal distances."""
    return [rows[i * len(rows) // count] for i in range(count)] if count < len(rows) else rows


def fictitious(authors: int, forget_authors: int) -> SimulatedData:
    """Return the made-up authors of the demo, without real authors and world facts.

    The last ``forget_authors`` of them are the forget set.

    Raises:
        ValueError: no author to forget or to retain, or more authors than names.
    """
    if not 1 <= forget_authors < authors:
        raise ValueError(
            f"`--forget-authors`: expected 1 .. {authors - 1} (fewer than --authors), got {forget_authors}"
        )
    data = made_up_data(forget_authors=forget_authors, retain_authors=authors - forget_authors, asked=0, world=0)
    return replace(data, name=f"{authors} fictitious authors")


def tofu(folder: str | Path, authors: int, forget_authors: int) -> SimulatedData:
    """Return TOFU's rows for the demo, without real authors and world facts.

    Its last ``forget_authors`` authors are the forget set, its first ``authors - forget_authors`` the retain set.

    Raises:
        FileNotFoundError: a file of TOFU is missing in the folder.
        ValueError: TOFU has no perturbed answers for this number of authors.
    """
    if forget_authors not in _TOFU_SPLITS.values():
        known = ", ".join(f"{count} ({split})" for split, count in _TOFU_SPLITS.items())
        raise ValueError(f"`--forget-authors`: expected {known}, as in a forget split of TOFU, got {forget_authors}")
    retain_authors, most = authors - forget_authors, _TOFU_EVALUATED // TOFU_ROWS_PER_AUTHOR
    if not 1 <= retain_authors <= most:
        raise ValueError(
            f"`--authors`: expected {forget_authors + 1} .. {forget_authors + most}, including {forget_authors} to "
            f"forget (TOFU has perturbed answers for {most} retain authors), got {authors}"
        )
    split = next(split for split, count in _TOFU_SPLITS.items() if count == forget_authors)
    data = tofu_data(folder, split, forget_authors=forget_authors, retain_authors=retain_authors, asked=0, world=0)
    return replace(data, name=f"TOFU, {authors} authors")
