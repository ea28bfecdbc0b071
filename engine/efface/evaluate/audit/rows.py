"""The rows of an audit: what TOFU's columns, and those of data sets like it, mean to its views."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from efface.evaluate.audit.languages import Language, get_language
from efface.hf.rows import Rows, column

TOFU_GROUP = 20  # TOFU's rows of an author, one behind the other


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
        ValueError: no rows, a missing column, a value that is not text, an unknown language.
    """
    if not len(rows):
        raise ValueError("`rows`: expected at least one row to audit, got none")
    if group_size < 1:
        raise ValueError(f"`group_size`: expected at least 1, got {group_size}")
    questions, answers = column(rows, "question", "audit data"), column(rows, "answer", "audit data")
    blocks = len(rows) % group_size == 0
    groups: Sequence[Any] = [i // group_size if blocks else None for i in range(len(rows))]
    if group_column is not None:
        groups = column(rows, group_column, "audit data")
    return [
        _row(i, question, answer, rows[i], group)
        for i, (question, answer, group) in enumerate(zip(questions, answers, groups, strict=True))
    ]


def _row(number: int, question: Any, answer: Any, row: Mapping[str, Any], group: Any) -> AuditRow:
    paraphrase = row.get("paraphrased_answer") or answer
    perturbed = row.get("perturbed_answer") or ()
    perturbed = (perturbed,) if isinstance(perturbed, str) else tuple(perturbed)
    for name, text in (("question", question), ("answer", answer), ("paraphrased_answer", paraphrase)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"audit data, row {number}: expected text in column {name!r}, got {text!r}; drop the row")
    if not all(isinstance(text, str) and text.strip() for text in perturbed):
        raise ValueError(f"audit data, row {number}: expected texts in column 'perturbed_answer', got {perturbed!r}")
    try:
        language = get_language(str(row.get("language") or "en"))
    except ValueError as error:
        raise ValueError(f"audit data, row {number}: {error}") from error
    group = None if group is None else str(group)
    return AuditRow(question, answer, paraphrase, tuple(perturbed), group, language)
