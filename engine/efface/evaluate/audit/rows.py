"""Reading of the rows of an audit from the columns of TOFU or of a similar data set."""

from dataclasses import dataclass

from efface.evaluate.audit.languages import Language, get_language
from efface.hf.text.rows import Rows, check_columns, check_rows, optional_texts, text_lists, texts

TOFU_GROUP = 20  # consecutive rows about one author in TOFU
_SOURCE = "audit data"


@dataclass(frozen=True)
class AuditRow:
    """A question whose answer should be forgotten.

    Attributes:
        question: the question as in the training data.
        answer: the answer as in the training data.
        paraphrase: column ``paraphrased_answer``, which is worded like the false answers; the answer if the row has no
            paraphrase.
        perturbed: false answers; empty if the data has no false answers.
        group: the person or topic that the row is about; None if unknown.
        language: language of the row, from column ``language``; English without it.
    """

    question: str
    answer: str
    paraphrase: str
    perturbed: tuple[str, ...]
    group: str | None
    language: Language


def audit_rows(rows: Rows, *, group_column: str | None = None, group_size: int = TOFU_GROUP) -> list[AuditRow]:
    """Read rows with the columns ``question`` and ``answer``, and optional columns as in ``AuditRow``.

    Args:
        rows: a list of mappings, or a datasets.Dataset.
        group_column: column that identifies the author of a row. None takes each block of ``group_size`` consecutive
            rows as one author, if the number of rows is a multiple of it.
        group_size: number of rows of a block.

    Raises:
        ValueError: there are no rows, a column is missing, a value is not text, or a language is unknown.
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
        known = get_language(language or "en")
    except ValueError as error:
        raise ValueError(f"{_SOURCE}, row {number}: {error}") from error
    return AuditRow(question, answer, paraphrase, tuple(perturbed), group, known)
