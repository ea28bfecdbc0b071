"""TOFU's evaluation (arXiv 2401.06121): its rows, the numbers of each split, Model Utility and Forget Quality."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from efface.evaluate.generation import GenerationTask, empty_texts, rouge_recall
from efface.evaluate.likelihood import AnswerTask, mean_logprobs
from efface.evaluate.logs import (
    CONFIG,
    EVAL,
    PREFIXES,
    SPLITS,
    EvalLog,
    FloatArray,
    MetricResult,
    SplitLog,
    check_results,
    log_of,
    metric_of,
    model_facts,
    read_json,
    read_log,
    summary_of,
    write_results,
)
from efface.evaluate.protocol import Protocol, get_protocol
from efface.evaluate.quality import check_same_rows, forget_quality, model_utility
from efface.evaluate.runner import Progress, RowResult, Task, on_first, run_tasks
from efface.hf.text.rows import Rows, load_rows, text_lists, texts
from efface.hf.text.templates import AUTO, Template, get_template
from efface.processes import processes

ROWS = ".rows.sqlite"
"""In an output folder, the rows that are finished; deleting it costs no more than computing them anew."""

_HUB = "locuslab/TOFU"
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
        for text in (result.questions[row], *candidates):
            if not text.strip():
                raise ValueError(
                    f"{source}, row {row}: expected a question and answers of text, got {text!r}; drop the row"
                )
    return result


def _source(data: str | Path | None, name: str) -> str:
    folder = Path(data or _HUB).expanduser()
    if not folder.is_dir():
        if data is not None and str(data).startswith((".", "/", "~")):  # must not become a search on the Hub
            raise FileNotFoundError(f"data folder {str(data)!r} does not exist; check the path")
        return f"{data or _HUB}:{name}:train"
    for suffix in _SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return str(folder / f"{name}{suffix}")
    there = sorted(path.stem for suffix in _SUFFIXES for path in folder.glob(f"*_perturbed{suffix}"))
    raise FileNotFoundError(
        f"data folder {str(data)!r}: expected {name}.json, as TOFU's, got {', '.join(there) or 'no *_perturbed file'}; "
        "choose another --split, or another --data"
    )


def split_metrics(
    split: str,
    rows: TofuRows,
    logprobs: Sequence[Sequence[float]],
    generations: Sequence[RowResult],
    protocol: Protocol,
) -> dict[str, MetricResult]:
    """Return the metrics of a split by name.

    Args:
        split: "forget", "retain", "real_authors" or "world_facts".
        rows: of it.
        logprobs: of each row, the mean log-probability of a token of each of its ``candidates``.
        generations: of each row, ``input``, ``generation`` and the ROUGE scores.
        protocol: how they are counted.

    Raises:
        FloatingPointError: a log-probability that is not finite, or a truth ratio that overflows.
    """
    prefix = PREFIXES[split]
    _refuse_infinite(split, rows, logprobs)
    values = np.array(logprobs, np.float64)  # (rows, candidates)
    answer, false = values[:, 0], values[:, -len(rows.false_answers[0]) :]
    true = answer if rows.paraphrases is None else values[:, 1]
    ratios = protocol.truth_ratios(true, false)
    _refuse_overflow(split, ratios)

    metrics = {
        f"{prefix}_Q_A_Prob": _probabilities(answer),
        f"{prefix}_Q_A_PERT_Prob": _probabilities(false),
        f"{prefix}_Q_A_ROUGE": metric_of(
            float(np.mean([row["rougeL_recall"] for row in generations])),
            ({**row, "ground_truth": answer} for row, answer in zip(generations, rows.answers, strict=True)),
        ),
        "forget_truth_ratio" if split == "forget" else f"{prefix}_Truth_Ratio": metric_of(
            protocol.forgotten(ratios) if split == "forget" else protocol.kept(ratios),
            ({"score": ratio} for ratio in ratios.tolist()),
        ),
    }
    if rows.paraphrases is not None:
        metrics[f"{prefix}_Q_A_PARA_Prob"] = _probabilities(true)
    if split in ("real_authors", "world_facts"):
        shares = protocol.share(answer, false)
        metrics[f"{prefix}_Q_A_Prob_normalised"] = metric_of(
            float(shares.mean()), ({"prob": share} for share in shares.tolist())
        )
    return metrics


def _probabilities(logprobs: FloatArray) -> MetricResult:
    """Probability e^l and average loss −l of every row: numbers (rows,), or lists of them (rows, answers)."""
    probability = np.exp(logprobs)
    rows = zip(probability.tolist(), (-logprobs).tolist(), strict=True)
    return metric_of(float(probability.mean()), ({"prob": prob, "avg_loss": loss} for prob, loss in rows))


def _refuse_infinite(split: str, rows: TofuRows, logprobs: Sequence[Sequence[float]]) -> None:
    for row, (values, candidates) in enumerate(zip(logprobs, rows.candidates(), strict=True)):
        for value, text in zip(values, candidates, strict=True):
            if not np.isfinite(value):
                raise FloatingPointError(
                    f"{split}, row {row}: the model gives the answer {text[:60]!r} a mean log-probability of {value}; "
                    "its weights are not finite or its activations overflow: look at the run that made it, or evaluate "
                    "in bfloat16 or float32"
                )


def _refuse_overflow(split: str, ratios: FloatArray) -> None:
    if (bad := np.flatnonzero(~np.isfinite(ratios))).size:
        raise FloatingPointError(
            f"{split}, row {bad[0]}: expected a truth ratio, got {ratios[bad[0]]}: the model gives the true answer a "
            "probability of 0; it is ruined beyond what this protocol can count"
        )


@dataclass(frozen=True)
class TofuResult:
    """What an evaluation found out.

    Attributes:
        log: per-row results, as ``model_utility``, ``forget_quality`` and reports take them.
        summary: open-unlearning's names and values: ``model_utility``, ``forget_quality``, ``forget_Q_A_Prob``, …; what
            was not asked for or has nothing to compare with is not there.
        content: of ``TOFU_EVAL.json``, in open-unlearning's schema.
        empty: how many generations of each split hold no word that ROUGE reads, so that it is 0.
    """

    log: EvalLog
    summary: dict[str, float]
    content: dict[str, MetricResult]
    empty: dict[str, int]


class TofuEvaluation:
    """TOFU's evaluation of a data set, made once and used on any number of models.

    Called with a model it returns the summary, so that it follows a run on every process of it::

        evaluate = TofuEvaluation(tokenizer, split="forget10", retain_log="retain90/TOFU_EVAL.json")
        UnlearnTrainer(..., callbacks=[EvaluateCallback(evaluate), KeepBest("forget_quality", ("model_utility", 0.5))])

    Args:
        tokenizer: of the models.
        data: a folder with TOFU's files (``forget10_perturbed.json``, ``retain_perturbed.json``, …), a data set on the
            Hub with such configurations, or None for ``locuslab/TOFU``.
        split: the forget split: forget01, forget05, forget10, or another of the data set's.
        splits: which of forget, retain, real_authors and world_facts; Model Utility needs the last three, Forget
            Quality the first.
        protocol: "open-unlearning", "tofu", or a ``Protocol``.
        compat: "open-unlearning" for its labels, prompts and attention mask too, quirk for quirk; slow.
        retain_log: of a model trained on the retain set only, or the path of one; None leaves Forget Quality out.
        template: see ``efface.hf.text.templates``.
        token_budget: tokens of a forward pass; it decides about memory and speed, not about results.

    Raises:
        FileNotFoundError: data or a log that does not exist.
        ValueError: an unknown split or protocol, rows that cannot be evaluated, a retain log of other rows; as
            ``AnswerTask`` and ``GenerationTask``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: str | Path | None = None,
        *,
        split: str = "forget10",
        splits: Sequence[str] = SPLITS,
        protocol: str | Protocol = "open-unlearning",
        compat: str | None = None,
        retain_log: str | Path | EvalLog | None = None,
        template: str | Template = AUTO,
        token_budget: int = 8192,
    ) -> None:
        if not splits or set(splits) - set(SPLITS):
            raise ValueError(f"`splits`: expected some of {', '.join(SPLITS)}, got {', '.join(splits) or 'none'}")
        self.protocol = get_protocol(protocol, compat)
        self.template = get_template(template, tokenizer, compat=self.protocol.labels)
        self.data, self.split = str(data or _HUB), split
        self.rows: dict[str, TofuRows] = {
            name: load_split(data, name, split, self.protocol) for name in SPLITS if name in splits
        }
        self.retain_log = None if retain_log is None else self._comparable(retain_log)
        self._likelihoods: list[Task] = []
        self._generations: list[Task] = []
        options: dict[str, Any] = {"template": self.template, "token_budget": token_budget}
        options["max_length"] = self.protocol.max_length
        if self.protocol.hides_padding:
            known = tokenizer.pad_token_id
            options["hidden"] = tokenizer.eos_token_id if known is None else known
        limits: dict[str, Any] = {"max_new_tokens": self.protocol.max_new_tokens}
        limits["padded_rows"] = self.protocol.padded_rows
        for name, rows in self.rows.items():
            questions, answers = rows.questions, rows.candidates()
            self._likelihoods.append(AnswerTask(tokenizer, questions, answers, name=f"{name} answers", **options))
            self._generations.append(
                GenerationTask(tokenizer, questions, name=f"{name} generations", **limits, **options)
            )

    def __call__(self, model: Any) -> dict[str, float]:
        """Return the summary of a model's evaluation."""
        return self.evaluate(model).summary

    def evaluate(
        self, model: Any, *, store: str | Path | None = None, progress: Progress | None = None, source: str = "model"
    ) -> TofuResult:
        """Evaluate a model; on several processes, all call this and get the result.

        Args:
            model: a causal language model, fused or not.
            store: keeps finished rows; see ``run_tasks``.
            progress: see ``run_tasks``.
            source: what messages about the log call it.

        Raises:
            FloatingPointError: a log-probability that is not finite: what comes of it would be no number.
            ValueError: as ``run_tasks``.
        """
        results = run_tasks(model, [*self._likelihoods, *self._generations], store=store, progress=progress)
        count = len(self.rows)
        content: dict[str, MetricResult] = {}
        empty: dict[str, int] = {}
        for (name, rows), found, answered in zip(self.rows.items(), results[:count], results[count:], strict=True):
            written = [result["text"] for result in answered]
            generations = [
                {**rouge_recall(text, answer), "input": question, "generation": text.strip()}
                for question, answer, text in zip(rows.questions, rows.answers, written, strict=True)
            ]
            content |= split_metrics(name, rows, mean_logprobs(found), generations, self.protocol)
            empty[name] = empty_texts(written)
        log = log_of(content, source)
        content["forget_quality"] = {
            "agg_value": None if self.retain_log is None else forget_quality(log, self.retain_log)
        }
        if {"retain", "real_authors", "world_facts"} <= self.rows.keys():
            content["model_utility"] = {"agg_value": model_utility(log)["Model Utility"]}
        return TofuResult(log, summary_of(content), content, empty)

    def _comparable(self, retain_log: str | Path | EvalLog) -> EvalLog:
        """Return the retain log, once it is sure that Forget Quality can be told from it."""
        if "forget" not in self.rows:
            raise ValueError(f"`retain_log`: expected 'forget' among the splits, got {', '.join(self.rows)}")
        log = retain_log if isinstance(retain_log, EvalLog) else read_log(retain_log)
        if not isinstance(retain_log, EvalLog):
            self._check_counted_alike(Path(retain_log).expanduser())
        log.rows("forget", "truth_ratio")
        answers = {str(row): answer for row, answer in enumerate(self.rows["forget"].answers)}
        mine = EvalLog(
            {"forget": SplitLog(index=tuple(answers), answers=answers)},
            source=f"{self.split} under protocol {self.protocol.name}",
        )
        check_same_rows(mine, log)
        return log

    def _check_counted_alike(self, log: Path) -> None:
        """Raise ValueError if the settings beside a log of ours say that it counts otherwise."""
        beside = log.with_name(CONFIG)
        if log.name != EVAL or not beside.is_file():
            return
        content = read_json(beside, "settings of an evaluation")
        for part, own in (("protocol", asdict(self.protocol)), ("template", asdict(self.template))):
            theirs = content.get(part) if isinstance(content, dict) else None
            if not isinstance(theirs, dict):
                continue
            differ = [name for name in own if name != "name" and name in theirs and theirs[name] != own[name]]
            if differ:
                raise ValueError(
                    f"`retain_log`: {str(log)!r} is of another {part} ({differ[0]} is {theirs[differ[0]]!r} there and "
                    f"{own[differ[0]]!r} here), so that its numbers cannot be compared; evaluate the retain model with "
                    "the settings of this evaluation"
                )

    def facts(self) -> dict[str, Any]:
        """Return what the numbers are of, beside the model, as JSON."""
        return {
            "benchmark": "TOFU",
            "data": self.data,
            "split": self.split,
            "rows": {name: len(rows.questions) for name, rows in self.rows.items()},
            "protocol": asdict(self.protocol),
            "template": asdict(self.template),
            "retain_log": None if self.retain_log is None else self.retain_log.source,
        }


def tofu(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | None = None,
    *,
    split: str = "forget10",
    splits: Sequence[str] = SPLITS,
    protocol: str | Protocol = "open-unlearning",
    compat: str | None = None,
    retain_log: str | Path | EvalLog | None = None,
    template: str | Template = AUTO,
    token_budget: int = 8192,
    output: str | Path | None = None,
    overwrite: bool = True,
    progress: Progress | None = None,
) -> TofuResult:
    """Evaluate a model on TOFU; arguments and errors are those of ``TofuEvaluation`` and its ``evaluate``.

    Args:
        model: a causal language model, fused or not.
        tokenizer: its tokenizer.
        data: where TOFU's files are.
        split: the forget split.
        splits: which of the four to evaluate.
        protocol: "open-unlearning" or "tofu".
        compat: "open-unlearning" for its labels, prompts and attention mask too.
        retain_log: what Forget Quality compares with.
        template: see ``efface.hf.text.templates``.
        token_budget: tokens of a forward pass.
        output: a folder for ``TOFU_EVAL.json`` and ``TOFU_SUMMARY.json`` in open-unlearning's schema, and
            ``EVAL_CONFIG.json``, which says what they are of. It also keeps finished rows, by the content of model and
            row: a killed evaluation goes on where it was.
        overwrite: replace results of an earlier evaluation there; else those of another model or with other settings
            are an error (``FileExistsError``), and metrics of the same stay beside the new ones.
        progress: see ``run_tasks``.
    """
    evaluation = TofuEvaluation(
        tokenizer,
        data,
        split=split,
        splits=splits,
        protocol=protocol,
        compat=compat,
        retain_log=retain_log,
        template=template,
        token_budget=token_budget,
    )
    if output is None:
        return evaluation.evaluate(model, progress=progress)
    folder = Path(output).expanduser()
    if not overwrite:
        on_first(processes(), lambda: check_results(folder, {**model_facts(model), **evaluation.facts()}))
    result = evaluation.evaluate(model, store=folder / ROWS, progress=progress, source=str(folder / EVAL))
    if processes().is_main_process:
        facts = {**model_facts(model), **evaluation.facts(), "empty_generations": result.empty}
        write_results(folder, result.content, facts, beside=not overwrite)
    return result
