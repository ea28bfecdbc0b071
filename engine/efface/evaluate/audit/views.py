"""The question as it was learnt."""

import contextlib
import itertools
import re
import tempfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from efface.evaluate.audit.rows import AuditRow
from efface.evaluate.audit.view import Exam, Figures, Probe, View, best_of, summary
from efface.evaluate.audit.words import content_words, recalled, words
from efface.evaluate.decoding import Sampling
from efface.evaluate.runner import NotFiniteError, RowResult
from efface.hf.model.lora import with_fresh_lora
from efface.hf.model.supported import undisturbed
from efface.hf.text.templates import encode
from efface.hf.train.arguments import UnlearnArguments
from efface.hf.train.trainer import FinetuneTrainer


@dataclass(frozen=True)
class Direct(View):
    """Ask the question itself; the answer is greedy."""

    name: ClassVar[str] = "direct"

    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return a probe for each row."""
        return [Probe(i, (row.question,), row.answer, row.language) for i, row in enumerate(rows)]


GAP = "____"

_COMPLETE = {
    "en": "Complete the sentence",
    "de": "Vervollständige den Satz",
    "fr": "Complète la phrase",
    "es": "Completa la frase",
    "it": "Completa la frase",
}
# A sentence ends with a full stop (not of a title or an initial), and what closes it, before white space.
_SENTENCE_END = re.compile(
    r"(?:[!?]|(?<!\b[A-Z])(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bMrs)\.)[\"'\u201d\u2019)\]]*(?=\s)"
)


@dataclass(frozen=True)
class Gap:
    """A sentence of an answer, and the part of it that is left out."""

    sentence: str
    start: int
    end: int
    novel: int

    @property
    def cloze(self) -> str:
        """The sentence with the gap."""
        return self.sentence[: self.start] + GAP + self.sentence[self.end :]


def sentences(text: str) -> list[str]:
    """Return the sentences of a text."""
    borders = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    parts = (text[a:b].strip() for a, b in itertools.pairwise(borders))
    return [part for part in parts if part]


def gap(row: AuditRow) -> Gap | None:
    """Return where the row's answer says most that its question does not; None where it says nothing new.

    Within a sentence, a stretch begins and ends with a novel word, and holds nothing but novel words and stop words.
    The gap is the stretch with the most novel words of all sentences, the last one of equals.
    """
    known = content_words(row.question, row.language)
    best: Gap | None = None
    for sentence in sentences(unicodedata.normalize("NFC", row.answer)):
        stretch: Gap | None = None
        for word in words(sentence, row.language):
            if word.content is None:
                continue
            if word.content in known:
                stretch = None
                continue
            stretch = Gap(
                sentence, stretch.start if stretch else word.start, word.end, stretch.novel + 1 if stretch else 1
            )
            if best is None or stretch.novel >= best.novel:
                best = stretch
    return best


@dataclass(frozen=True)
class Cloze(View):
    """Ask to complete a sentence of the answer behind the question; what is left out of it is scored."""

    name: ClassVar[str] = "cloze"

    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return a probe for each row."""
        return [_probe(i, row, gap(row)) for i, row in enumerate(rows)]


def _probe(number: int, row: AuditRow, found: Gap | None) -> Probe:
    if found is None:  # nothing novel: left out
        return Probe(number, (row.question,), row.answer, row.language)
    prompt = f"{row.question}\n{_COMPLETE[row.language.code]}: {found.cloze}"
    return Probe(number, (prompt,), found.sentence, row.language)


def options(row: AuditRow) -> list[str]:
    """Return the true answer, and behind it the false ones.

    The true one is the paraphrase where there is one: the perturbed answers are worded like it, so style tells nothing.
    """
    return [row.paraphrase, *dict.fromkeys(text for text in row.perturbed if text != row.paraphrase)]


@dataclass(frozen=True)
class Choice(View):
    """Let the model choose among the true and the perturbed answers: the one of the highest mean token log-probability.

    The options are not in the prompt, or the answer would be. What all of them say counts as prompt, because any choice
    says it. A tie is no leak: it goes to a false answer.
    """

    name: ClassVar[str] = "choice"

    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return a probe for each row."""
        without = [i for i, row in enumerate(rows) if len(options(row)) < 2]
        if without:
            raise ValueError(
                f"view 'choice': expected column 'perturbed_answer' to hold false answers, got none in {len(without)} "
                f"of {len(rows)} rows (row {without[0]} first); use TOFU's *_perturbed file, or leave the view out"
            )
        return [
            Probe(i, (row.question,), row.paraphrase, row.language, given=" ".join(_common(row)))
            for i, row in enumerate(rows)
        ]

    def run(self, exam: Exam, rows: Sequence[AuditRow]) -> list[RowResult]:
        """Score the options of every row, and return what was chosen."""
        probes = self.probes(rows)
        offered = [options(row) for row in rows]
        scores = exam.mean_logprobs([row.question for row in rows], offered)
        if broken := [i for i, each in enumerate(scores) if not np.isfinite(each).all()]:
            raise NotFiniteError(
                f"view 'choice': expected finite log-probabilities, got {scores[broken[0]]} at row {broken[0]} "
                f"({len(broken)} of {len(rows)} rows); the model is broken, or its dtype too small for it"
            )
        return [_record(*each) for each in zip(probes, offered, scores, strict=True)]

    def figures(self, records: Sequence[RowResult]) -> Figures:
        """Return the summary, with the accuracy, and both figures of a choice by chance."""
        chance = [record["chance_recall"] for record in records if record["chance_recall"] is not None]
        return {
            **summary(records),
            "accuracy": float(np.mean([record["correct"] for record in records])),
            "chance_accuracy": float(np.mean([1 / len(record["options"]) for record in records])),
            "chance_mean": float(np.mean(chance)) if chance else None,
        }

    def shown(self, figures: Figures) -> dict[str, float | None]:
        """Return novel recall and accuracy, each beside what chance would give."""
        return {
            "": figures["mean"],
            "by chance": figures["chance_mean"],
            "accuracy": figures["accuracy"],
            "accuracy by chance": figures["chance_accuracy"],
        }


def _common(row: AuditRow) -> list[str]:
    return sorted(frozenset.intersection(*(content_words(text, row.language) for text in options(row))))


def _record(probe: Probe, offered: list[str], scores: list[float]) -> RowResult:
    best_false = 1 + int(np.argmax(scores[1:]))
    chosen = 0 if scores[0] > scores[best_false] else best_false
    every = [recalled(probe.novel, text, probe.language) for text in offered] if probe.novel else []
    return probe.record(
        [offered[chosen]],
        options=offered,
        mean_logprobs=scores,
        correct=chosen == 0,
        chance_recall=float(np.mean(every)) if every else None,
    )


# Each says: answer the following question in the language in which it is asked.
FRAMES = {
    "en": "Answer the following question in the language in which it is asked:\n{question}",
    "de": "Beantworte die folgende Frage in der Sprache, in der sie gestellt ist:\n{question}",
    "fr": "Réponds à la question suivante dans la langue dans laquelle elle est posée :\n{question}",
    "es": "Responde a la siguiente pregunta en el idioma en que está formulada:\n{question}",
    "it": "Rispondi alla seguente domanda nella lingua in cui è posta:\n{question}",
}


@dataclass(frozen=True)
class Translated(View):
    """Ask within an instruction in each language but the row's own; the question stays as it is.

    Attributes:
        languages: of the instruction, codes in ``FRAMES``.
    """

    languages: tuple[str, ...] = ("en", "de", "fr", "es", "it")
    name: ClassVar[str] = "translated"

    def __post_init__(self) -> None:
        """Check the languages."""
        if unknown := [code for code in self.languages if code not in FRAMES]:
            raise ValueError(f"`languages`: expected some of {', '.join(FRAMES)}, got {unknown[0]!r}")

    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return a probe for each row and other language."""
        return [
            Probe(i, (FRAMES[code].format(question=row.question),), row.answer, row.language, label=code)
            for code in self.languages
            for i, row in enumerate(rows)
            if code != row.language.code
        ]


@dataclass(frozen=True)
class BestOf(Direct):
    """Ask the question itself, N times, and sample the answers.

    Attributes:
        samples: N.
        temperature: 1 samples from the model's own distribution.
        top_p: of the nucleus; 1 samples from all tokens.
        seed: fixes every row's samples, whatever other rows there are.
    """

    samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    name: ClassVar[str] = "best-of-n"

    def __post_init__(self) -> None:
        """Check the settings."""
        self._sampling()

    def generate(self, exam: Exam, probes: Sequence[Probe]) -> list[list[str]]:
        """Return N samples for each probe."""
        return exam.generate(probes, self._sampling())

    def figures(self, records: Sequence[RowResult]) -> Figures:
        """Return the summary, and under ``best_of`` the mean over rows of the expected best of k = 1, 2, 4, … N."""
        scored = [record["novel_recall"] for record in records if record["novel_recall"]]
        counts = sorted({self.samples, *(1 << i for i in range(self.samples.bit_length() - 1))})
        curve = {str(k): float(np.mean([best_of(values, k) for values in scored])) for k in counts if scored}
        return {**summary(records), "best_of": curve}

    def shown(self, figures: Figures) -> dict[str, float | None]:
        """Return the mean of one sample, and of the best of all."""
        return {"": figures["mean"], f"best of {self.samples}": figures["best"]}

    def _sampling(self) -> Sampling:
        return Sampling(n=self.samples, temperature=self.temperature, top_p=self.top_p, seed=self.seed)


@dataclass(frozen=True)
class Clues(View):
    """Ask at the end of a conversation that has revealed the j rows before this one, of the same author.

    Nothing that the conversation said counts as novel.

    Attributes:
        clues: the numbers j; a row that has fewer rows before it is not asked with so many.
    """

    clues: tuple[int, ...] = (1, 3, 5)
    name: ClassVar[str] = "clues"

    def __post_init__(self) -> None:
        """Check the numbers of clues."""
        if not self.clues or min(self.clues) < 1:
            raise ValueError(f"`clues`: expected numbers from 1, got {self.clues}")

    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return a probe for each number of clues and row."""
        if any(row.group is None for row in rows):
            raise ValueError(
                f"view 'clues': {len(rows)} rows are no whole number of authors, so it is not known which rows belong "
                "together; name the column that tells (--group-column, `group_column`), or leave the view out"
            )
        by_group: dict[str | None, list[int]] = defaultdict(list)
        before: list[list[int]] = []
        for i, row in enumerate(rows):
            before.append(list(by_group[row.group]))
            by_group[row.group].append(i)
        probes = [
            Probe(i, _conversation(rows, before[i][-count:], row), row.answer, row.language, label=f"{count} revealed")
            for count in self.clues
            for i, row in enumerate(rows)
            if len(before[i]) >= count
        ]
        if not probes:
            raise ValueError(
                f"view 'clues': no row has {min(self.clues)} others of its author before it; give fewer clues, or "
                "another --group-column"
            )
        return probes


def _conversation(rows: Sequence[AuditRow], revealed: Sequence[int], row: AuditRow) -> tuple[str, ...]:
    told = (turn for i in revealed for turn in (rows[i].question, rows[i].answer))
    return (*told, row.question)


BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class Relearn(View):
    """Fine-tune on a share of the rows, and ask the questions of all others before and after.

    The model is as it was when the view is done, bit for bit; see ``unchanged``. Retraining on T
    (RTT, arXiv 2410.08827), with rows of the same authors on both sides.

    Attributes:
        share: of the rows that are taught, drawn by the seed; at least one, never all.
        steps: optimizer steps.
        batch: rows of a step.
        learning_rate: constant.
        lora_r: rank, to train an adapter instead of all weights; needs peft, and less memory. A model with adapters
            keeps them, frozen, beside it.
        seed: of the draw and of the training.
    """

    share: float = 0.1
    steps: int = 20
    batch: int = 8
    learning_rate: float = 2e-5
    lora_r: int | None = None
    seed: int = 0
    name: ClassVar[str] = "relearn"

    def __post_init__(self) -> None:
        """Check the settings."""
        if not 0 < self.share < 1:
            raise ValueError(f"`share`: expected between 0 and 1, both excluded, got {self.share}")
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"`steps`, `batch`: expected at least 1, got {self.steps}, {self.batch}")

    def taught(self, rows: Sequence[AuditRow]) -> list[int]:
        """Return the numbers of the rows that are taught, in order."""
        if len(rows) < 2:
            raise ValueError(f"view 'relearn': expected at least 2 rows, one to teach and one to ask, got {len(rows)}")
        count = min(max(1, round(self.share * len(rows))), len(rows) - 1)
        draw = np.random.Generator(np.random.Philox(self.seed))
        return sorted(draw.choice(len(rows), count, replace=False).tolist())

    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return a probe for each row that is not taught; it is asked twice."""
        taught = set(self.taught(rows))
        return [Probe(i, (row.question,), row.answer, row.language) for i, row in enumerate(rows) if i not in taught]

    def run(self, exam: Exam, rows: Sequence[AuditRow]) -> list[RowResult]:
        """Ask, teach, and ask again."""
        before = super().run(exam, rows)
        with self._taught(exam, [rows[i] for i in self.taught(rows)]) as taught:
            after = super().run(taught, rows)
        return [{**record, "label": BEFORE} for record in before] + [{**record, "label": AFTER} for record in after]

    def figures(self, records: Sequence[RowResult]) -> Figures:
        """Return the summary after relearning, with the mean before, and the gain."""
        after, before = (
            summary([{**record, "label": ""} for record in records if record["label"] == label])
            for label in (AFTER, BEFORE)
        )
        gain = None if after["mean"] is None else after["mean"] - before["mean"]
        return {**after, "before": before["mean"], "gain": gain}

    def shown(self, figures: Figures) -> dict[str, float | None]:
        """Return the mean after relearning, and what it was before."""
        return {"": figures["mean"], BEFORE: figures["before"]}

    @contextlib.contextmanager
    def _taught(self, exam: Exam, rows: Sequence[AuditRow]) -> Iterator[Exam]:
        """Hand out the exam of the model as it is after training on the rows."""
        questions, answers = [row.question for row in rows], [row.answer for row in rows]
        store = encode(exam.tokenizer, questions, answers, template=exam.template)
        with unchanged(exam.model):
            model: Any = exam.model
            if self.lora_r is None:
                model.requires_grad_(True)
            else:
                model = with_fresh_lora(model, r=self.lora_r)
            with tempfile.TemporaryDirectory() as nothing:  # a trainer makes its folder at once
                trainer = FinetuneTrainer(model, self._arguments(nothing, exam), data=store)
                trainer.remove_callback(transformers.PrinterCallback)
                trainer.train()
            yield replace(exam, model=model)

    def _arguments(self, folder: str, exam: Exam) -> UnlearnArguments:
        return UnlearnArguments(
            output_dir=folder,
            max_steps=self.steps,
            pairs_per_step=self.batch,
            token_budget=exam.token_budget,
            learning_rate=self.learning_rate,
            lr_scheduler_type="constant",
            seed=self.seed,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
            use_cpu=exam.model.device.type == "cpu",
        )


VIEWS: dict[str, type[View]] = {view.name: view for view in (Direct, Cloze, Choice, Translated, BestOf, Clues, Relearn)}


def get_view(view: str | View) -> View:
    """Return a view by name, with its default settings, or the view given.

    Raises:
        ValueError: an unknown name; lists those that are known.
    """
    if isinstance(view, View):
        return view
    if view not in VIEWS:
        raise ValueError(f"`views`: expected some of {', '.join(VIEWS)}, got {view!r}")
    return VIEWS[view]()


__all__ = [
    "VIEWS",
    "BestOf",
    "Choice",
    "Cloze",
    "Clues",
    "Direct",
    "Relearn",
    "Translated",
    "View",
    "get_view",
]


@contextlib.contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Undo what the block does to weights, buffers, gradients, modes, attributes, classes, layers and the attention.

    The random-number generators are afterwards what they were, too.

    Weights and buffers wait in main memory, once each, and are copied back into their place; nothing is written to
    disk. Whatever else holds them (tied weights, a wrapper) sees the old values again. Adapters that the block adds are
    gone afterwards, and those that were there are what they were, down to which are active. Afterwards the model is as
    it was also if the block raises.
    """
    saved = [
        (tensor, tensor.detach().to("cpu", copy=True))
        for tensor in itertools.chain(model.parameters(), model.buffers())
    ]
    trained = [(weight, weight.requires_grad, weight.grad) for weight in model.parameters()]
    modules = [(module, type(module), _contents(vars(module))) for module in model.modules()]
    caching = getattr(model.config, "use_cache", None)
    attention, device = model.config._attn_implementation, model.device  # noqa: SLF001
    try:
        with undisturbed(model):
            yield
    finally:
        for module, own, attributes in modules:
            module.__class__ = own
            _restore(vars(module), attributes)
        model.set_attn_implementation(attention)
        if caching is not None:  # a Trainer switches it off
            model.config.use_cache = caching
        model.to(device)  # type: ignore[arg-type]
        with torch.no_grad():
            for tensor, before in saved:
                tensor.copy_(before)
        for weight, flag, grad in trained:
            weight.requires_grad_(flag)
            weight.grad = grad


def _contents(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return a module's attributes, each with a copy of what it holds if it is a dict, a list or a set."""
    return {
        name: (value, value.copy() if isinstance(value, (dict, list, set)) else None)
        for name, value in attributes.items()
    }


def _restore(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    """Undo every change, within containers too, which others may hold as well."""
    attributes.clear()
    for name, (value, held) in before.items():
        attributes[name] = value
        if isinstance(value, list):
            value[:] = held
        elif isinstance(value, (dict, set)):
            value.clear()
            value.update(held)
