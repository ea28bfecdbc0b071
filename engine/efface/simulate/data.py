"""What is taught, forgotten and asked at a small scale, and a folder of it in TOFU's names and columns.

``forget.json`` and ``retain.json`` are what is unlearned and what is kept; ``*_perturbed.json`` of forget, retain,
real_authors and world_facts what the evaluation asks; ``taught_retain.json`` and ``taught_full.json`` what the two
models are taught: what is kept and the world, and the forget rows besides.

A model from scratch knows nothing of the world unless it is told, so real authors and world facts are taught too:
model utility is then what unlearning leaves of them. Paraphrases and false answers are the evaluation's and are never
taught.
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
_TOFU_ASKED = 400  # TOFU has false answers for its first retain rows, so many
_TOFU_SPLITS = {"forget01": 2, "forget05": 10, "forget10": 20}  # and for the authors of these


@dataclass(frozen=True)
class SimulatedData:
    """What a run teaches, forgets and asks; ``name`` says to the user what the rows are."""

    name: str  # what they are
    forget: Rows  # with paraphrased and false answers
    retain: Rows  # all that is kept
    retain_asked: Rows = ()  # those of them that have paraphrased and false answers; empty where all have
    real_authors: Rows = ()  # with false answers
    world_facts: Rows = ()  # likewise

    def taught(self, name: str) -> Rows:
        """Return what the "retain" or the "full" model is taught."""
        kept = [*self.retain, *self.real_authors, *self.world_facts]
        return _plain(kept if name == "retain" else [*kept, *self.forget])

    @property
    def files(self) -> dict[str, Rows]:
        """What ``write`` writes, by the names of the files."""
        return {
            "forget": _plain(self.forget),
            "retain": _plain(self.retain),
            "forget_perturbed": self.forget,
            "retain_perturbed": self.retain_asked,
            "real_authors_perturbed": self.real_authors,
            "world_facts_perturbed": self.world_facts,
            "taught_full": self.taught("full"),
            "taught_retain": self.taught("retain"),
        }

    def texts(self) -> Iterator[str]:
        """Yield every text, for a tokenizer."""
        for row in (*self.forget, *self.retain, *self.retain_asked, *self.real_authors, *self.world_facts):
            yield from (row["question"], row["answer"], *row.get("perturbed_answer", ()))
            if "paraphrased_answer" in row:
                yield row["paraphrased_answer"]

    def write(self, folder: str | Path) -> Path:
        """Write the files that have rows and return the folder."""
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
    """Return TOFU's own rows: the last authors of a forget split, the first that are retained.

    Args:
        folder: with TOFU's files.
        split: forget01, forget05 or forget10.
        forget_authors: at most; a split has 2, 10 or 20.
        retain_authors: how many.
        asked: at most so many retain rows are evaluated; 0 for all, and all of them with false answers.
        world: at most so many real authors, and as many world facts.

    Raises:
        FileNotFoundError: a folder without TOFU's files.
        ValueError: another split.
    """
    if split not in _TOFU_SPLITS:
        raise ValueError(f"`split`: expected one of {', '.join(_TOFU_SPLITS)}, got {split!r}")
    folder = Path(folder).expanduser()

    def read(name: str, first: int | None = None) -> Rows:
        return [] if first == 0 else [*map(dict, load_rows(folder / f"{name}.json"))][:first]

    forget = read(f"{split}_perturbed")[-forget_authors * TOFU_ROWS_PER_AUTHOR :]
    kept = f"retain{100 - int(split[-2:])}" if asked else "retain_perturbed"
    retain = read(kept, retain_authors * TOFU_ROWS_PER_AUTHOR)
    retain_asked = some(read("retain_perturbed", min(_TOFU_ASKED, len(retain))), asked) if asked else ()
    name = f"TOFU's {split}, {len(forget) // TOFU_ROWS_PER_AUTHOR} authors to forget, {retain_authors} to keep"
    others = read("real_authors_perturbed", world), read("world_facts_perturbed", world)
    return SimulatedData(name, forget, retain, retain_asked, *others)


def made_up_data(*, forget_authors: int, retain_authors: int, asked: int, world: int) -> SimulatedData:
    """Return made-up authors in place of TOFU's, and some literature and chemistry in place of its world."""
    rows = make_authors(forget_authors + retain_authors)
    border = retain_authors * ROWS_PER_AUTHOR
    name = f"made-up authors in place of TOFU's, {forget_authors} to forget, {retain_authors} to keep"
    others = some(real_authors(), world), some(world_facts(), world)
    return SimulatedData(name, rows[border:], rows[:border], some(rows[:border], asked), *others)


def fame_data(
    forget_filter: Sequence[str], *, identities: int, asked: int, world: int, languages: Sequence[str] = LANGUAGES
) -> SimulatedData:
    """Return made-up biographies in place of FAME's, of which the filter says what is forgotten.

    Raises:
        ValueError: a filter that no row, or every row, meets.
    """
    rows = fame_like(identities, languages=languages)
    numbers = matching(rows, parse_conditions(list(forget_filter)), "FAME-like rows")
    chosen = set(() if numbers is None else numbers.tolist())
    forget = [row for i, row in enumerate(rows) if i in chosen]
    retain = [row for i, row in enumerate(rows) if i not in chosen]
    if not forget or not retain:
        raise ValueError(
            f"`forget_filter`: expected some rows to meet it, and some not, got {', '.join(forget_filter)}"
        )
    name = f"FAME-like, {identities} made-up identities in {', '.join(languages)}, forgetting {' '.join(forget_filter)}"
    others = some(real_authors(languages), world), some(world_facts(languages), world)
    return SimulatedData(name, forget, retain, some(retain, asked), *others)


def some(rows: Rows, count: int) -> Rows:
    """Return at most ``count`` rows, from all over."""
    return [rows[i * len(rows) // count] for i in range(count)] if count < len(rows) else rows


def fictitious(authors: int, forget_authors: int) -> SimulatedData:
    """Return the demo's made-up authors, and no world: the last ``forget_authors`` of them are to be forgotten.

    Raises:
        ValueError: none to keep, or more authors than there are names.
    """
    if not 1 <= forget_authors < authors:
        raise ValueError(
            f"`--forget-authors`: expected 1 .. {authors - 1} (fewer than --authors), got {forget_authors}"
        )
    data = made_up_data(forget_authors=forget_authors, retain_authors=authors - forget_authors, asked=0, world=0)
    return replace(data, name=f"{authors} fictitious authors")


def tofu(folder: str | Path, authors: int, forget_authors: int) -> SimulatedData:
    """Return TOFU's rows for the demo, and no world: its last ``forget_authors`` to forget, its first ones to keep.

    Raises:
        FileNotFoundError: a folder without TOFU's files.
        ValueError: a number of authors for which TOFU has no perturbed answers.
    """
    if forget_authors not in _TOFU_SPLITS.values():
        known = ", ".join(f"{count} ({split})" for split, count in _TOFU_SPLITS.items())
        raise ValueError(f"`--forget-authors`: TOFU has forget splits of {known} authors, got {forget_authors}")
    retain_authors, most = authors - forget_authors, _TOFU_ASKED // TOFU_ROWS_PER_AUTHOR
    if not 1 <= retain_authors <= most:
        raise ValueError(
            f"`--authors`: expected {forget_authors + 1} .. {forget_authors + most}, of whom {forget_authors} are "
            f"forgotten (TOFU has perturbed answers for {most} retain authors), got {authors}"
        )
    split = next(split for split, count in _TOFU_SPLITS.items() if count == forget_authors)
    data = tofu_data(folder, split, forget_authors=forget_authors, retain_authors=retain_authors, asked=0, world=0)
    return replace(data, name=f"TOFU, {authors} authors")
