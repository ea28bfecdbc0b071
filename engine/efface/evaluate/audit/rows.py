"""The rows of an audit: what TOFU's columns, and those of data sets like it, mean to its views."""

from dataclasses import dataclass

from efface.evaluate.audit.languages import Language, get_language
from efface.hf.text.rows import Rows, check_columns, check_rows, optional_texts, text_lists, texts

TOFU_GROUP = 20  # TOFU's rows of an author, one behind the other
_SOURCE = "audit data"


@dataclass(frozen=True)
class AuditRow:
    """A question whose answer should be forgotten.

    Attributes:
        question: as it was learnt.
        answer: likewise.
        paraphrase: ``paraphrased_answer``, or the answer where the row has none: it is worded as the false ones are.
        perturbed: false answers; none where the data has none.
        group: whom or what the row is about; None if the data does not tell.
        language: in which it is written, ``language`` of the row; English if it has none.
    """

    question: str
    answer: str
    paraphrase: str
    perturbed: tuple[str, ...]
    group: str | None
    language: Language


def audit_rows(rows: Rows, *, group_column: str | None = None, group_size: int = TOFU_GROUP) -> list[AuditRow]:
    """Read rows with ``question`` and ``answer``, and whatever else they have.

    Args:
        rows: a list of mappings, or a datasets.Dataset.
        group_column: tells whom a row is about; None: blocks of ``group_size`` rows are about one author each, if
            there is a whole number of them.
        group_size: rows of a block.

    Raises:
        ValueError: no rows, a missing column, a value that has no text, an unknown language.
    """
    check_rows(rows, "`rows`")
    if not len(rows):
        raise ValueError("`rows`: expected at least one row to audit, got none")
    if group_size < 1:
        raise ValueError(f"`group_size`: expected at least 1, got {group_size}")
    blocks = len(rows) % group_size == 0
    groups: list[str | None] = [str(i // group_size) if blocks else None for i in range(len(rows))]
    if group_column is not None:
        check_columns(rows, [group_column], _SOURCE)
        groups = [group or None for group in optional_texts(rows, group_column, _SOURCE)]
    columns = zip(
        texts(rows, "question", _SOURCE),
        texts(rows, "answer", _SOURCE),
        optional_texts(rows, "paraphrased_answer", _SOURCE),
        text_lists(rows, "perturbed_answer", _SOURCE, optional=True),
        groups,
        optional_texts(rows, "language", _SOURCE),
        strict=True,
    )
    return [_row(number, *values) for number, values in enumerate(columns)]


def _row(
    number: int,
    question: str,
    answer: str,
    paraphrase: str | None,
    perturbed: list[str],
    group: str | None,
    language: str | None,
) -> AuditRow:
    paraphrase = paraphrase or answer
    for name, text in (("question", question), ("answer", answer), ("paraphrased_answer", paraphrase)):
        if not text.strip():
            raise ValueError(f"{_SOURCE}, row {number}: expected text in column {name!r}, got {text!r}; drop the row")
    try:
        spoken = get_language(language or "en")
    except ValueError as error:
        raise ValueError(f"{_SOURCE}, row {number}: {error}") from error
    return AuditRow(question, answer, paraphrase, tuple(perturbed), group, spoken)
