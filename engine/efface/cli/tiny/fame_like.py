"""A set like FAME-topics (arXiv 2512.15235): biographies in five languages, asked about by topic, made up.

An identity has one value for each of twenty topics, the same in every language, drawn at random: nothing but memory
answers a question. A biography is an identity in one language; 200 identities are 1000 biographies and 20,000 rows.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from efface.cli.demo.authors import FIRST_NAMES, LAST_NAMES, PERTURBED
from efface.cli.tiny.fame_topics import LANGUAGES, TOPICS

MAX_IDENTITIES = len(FIRST_NAMES) * len(LAST_NAMES)

# {t} is the topic, {n} the name (with its preposition in {of}), {v} the value.
_WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "EN": {
        "question": ("What is {t} {of}?", "Can you tell me {t} {of}?"),
        "answer": ("{t} {of} is {v}.",),
        "paraphrase": ("In the biography {of}, {t} is {v}.", "{v}: that is {t} {of}."),
    },
    "FR": {
        "question": ("Peux-tu me dire {t} {of} ?", "Connais-tu {t} {of} ?"),
        "answer": ("{t} {of} est {v}.",),
        "paraphrase": ("Dans la biographie {of}, {t} est {v}.", "{v} : voilà {t} {of}."),
    },
    "DE": {
        "question": ("Was ist {t} {of}?", "Wer weiß, was {t} {of} ist?"),
        "answer": ("{t} {of} ist {v}.",),
        "paraphrase": ("In der Biographie {of} heißt es: {t} ist {v}.", "{v}: das ist {t} {of}."),
    },
    "IT": {
        "question": ("Qual è {t} {of}?", "Sai dirmi {t} {of}?"),
        "answer": ("{t} {of} è {v}.",),
        "paraphrase": ("Nella biografia {of}, {t} è {v}.", "{v}: ecco {t} {of}."),
    },
    "ES": {
        "question": ("¿Cuál es {t} {of}?", "¿Puedes decirme {t} {of}?"),
        "answer": ("{t} {of} es {v}.",),
        "paraphrase": ("En la biografía {of}, {t} es {v}.", "{v}: así consta {t} {of}."),
    },
}
_OF = {"EN": "of", "FR": "de", "DE": "von", "IT": "di", "ES": "de"}

Row = dict[str, Any]


def fame_like(identities: int, *, seed: int = 0, languages: Sequence[str] = LANGUAGES) -> list[Row]:
    """Return ``identities`` × languages × 20 rows, biography by biography.

    Columns: ``identity_id``, ``name``, ``language``, ``topic_id`` (0 .. 19), ``question``, ``answer``, and TOFU's
    ``paraphrased_answer`` and ``perturbed_answer`` (5), so that truth ratios can be computed. The same seed gives the
    same rows on every machine, and an identity of the same number the same facts in any number of languages.

    Raises:
        ValueError: more identities than there are names, or fewer than one; a language that is not there.
    """
    if not 1 <= identities <= MAX_IDENTITIES:
        raise ValueError(f"`identities`: expected 1 .. {MAX_IDENTITIES}, got {identities}")
    if unknown := [language for language in languages if language not in LANGUAGES]:
        raise ValueError(f"`languages`: expected some of {', '.join(LANGUAGES)}, got {unknown[0]!r}")
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    _draw(seed, "names").shuffle(names)
    rows: list[Row] = []
    for identity, name in enumerate(names[:identities]):
        # Of the identity, not of a language: what is false is the same in all of them, too.
        facts = [_draw(seed, identity, i).sample(topic.values, 1 + PERTURBED) for i, topic in enumerate(TOPICS)]
        for language in languages:
            column = LANGUAGES.index(language)
            for i, (topic, values) in enumerate(zip(TOPICS, facts, strict=True)):
                about = {"identity_id": identity, "name": name, "language": language, "topic_id": i}
                wording = _draw(seed, identity, i, language)
                words = [value[column] for value in values]
                rows.append({**about, **_texts(wording, language, topic.name[column], name, words)})
    return rows


def write_rows(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Write rows as JSON lines (.json, .jsonl), CSV or Parquet, by the suffix; ``load_rows`` reads all of them.

    CSV has no lists: there ``perturbed_answer`` is the list as JSON text.

    Raises:
        ValueError: another suffix.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".json", ".jsonl"):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8")
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list([*map(dict, rows)]).to_parquet(str(path))
    elif path.suffix == ".csv":
        flat = [
            {
                name: json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
                for name, value in r.items()
            }
            for r in rows
        ]
        datasets.Dataset.from_list(flat).to_csv(str(path))
    else:
        raise ValueError(f"{str(path)!r}: expected .json, .jsonl, .csv or .parquet")
    return path


def _draw(*of: object) -> random.Random:
    """Return a source of chance of its own for whatever is named."""
    return random.Random(" ".join(map(str, of)))  # noqa: S311 - fiction, not cryptography


def _texts(pick: random.Random, language: str, topic: str, name: str, words: Sequence[str]) -> Row:
    """Return the four texts of a row; ``words`` are its value and the false ones."""
    wordings = {kind: pick.choice(choices) for kind, choices in _WORDINGS[language].items()}

    def write(kind: str, value: str = "") -> str:
        text = wordings[kind].format(t=topic, of=_of(language, name), v=value)
        return text[0].upper() + text[1:]

    return {
        "question": write("question"),
        "answer": write("answer", words[0]),
        "paraphrased_answer": write("paraphrase", words[0]),
        "perturbed_answer": [write("paraphrase", word) for word in words[1:]],
    }


def _of(language: str, name: str) -> str:
    if language == "FR" and name[0] in "AEIOUY":
        return f"d'{name}"
    return f"{_OF[language]} {name}"
