"""Evaluation on TOFU (arXiv 2401.06121): loading of its rows, metrics of each split, Model Utility, Forget Quality."""

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
"""File of finished rows in an output folder. It can be deleted; the rows are then computed again."""

_HUB = "locuslab/TOFU"
_FILES = {
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
_SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class TofuRows:
    """Rows of one split. All lists have the same length.

    Attributes:
        source: where the rows come from, for messages.
        questions: the questions.
        answers: the true answers.
        paraphrases: paraphrases of the true answers, used by the truth ratio; None if it uses the answers themselves.
        false_answers: the false answers of each row; the number is the same for every row.
    """

    source: str
    questions: list[str]
    answers: list[str]
    paraphrases: list[str] | None
    false_answers: list[list[str]]

    def candidates(self) -> list[list[str]]:
        """Return all answers of each row: the true answer, its paraphrase if there is one, and the false answers."""
        if self.paraphrases is None:
            return [[answer, *false] for answer, false in zip(self.answers, self.false_answers, strict=True)]
        rows = zip(self.answers, self.paraphrases, self.false_answers, strict=True)
        return [[answer, paraphrase, *false] for answer, paraphrase, false in rows]


def load_split(data: str | Path | None, split: str, forget_split: str, protocol: Protocol) -> TofuRows:
    """Return the rows of "forget", "retain", "real_authors" or "world_facts".

    Only TOFU's ``*_perturbed`` files are read, because they repeat the questions and answers of the plain files.

    Args:
        data: a folder with TOFU's files, a data set on the Hub with TOFU's configurations, or None for TOFU itself.
        split: one of the four splits.
        forget_split: name of the forget split, such as "forget10".
        protocol: determines how many rows are read.

    Raises:
        FileNotFoundError: the folder does not exist, or has no file for the split.
        ValueError: a column is missing, a value is not text, a row has no answer, or the number of false answers
            differs between rows.
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
            f"{source}, 'perturbed_answer': expected the same number of false answers in every row, at least 1, got "
            f"{sorted(counts)}"
        )
    result = TofuRows(source, questions, answers, paraphrases, false_answers)
    for row, candidates in enumerate(result.candidates()):
        for text in (result.questions[row], *candidates):
            if not text.strip():
                raise ValueError(
                    f"{source}, row {row}: expected a question and answers with text, got {text!r}; drop the row"
                )
    return result


def _source(data: str | Path | None, name: str) -> str:
    folder = Path(data or _HUB).expanduser()
    if not folder.is_dir():
        if data is not None and str(data).startswith((".", "/", "~")):  # a path, not the name of a data set on the Hub
            raise FileNotFoundError(f"data folder {str(data)!r} does not exist; check the path")
        return f"{data or _HUB}:{name}:train"
    for suffix in _SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return str(folder / f"{name}{suffix}")
    there = sorted(path.stem for suffix in _SUFFIXES for path in folder.glob(f"*_perturbed{suffix}"))
    raise FileNotFoundError(
        f"data folder {str(data)!r}: expected TOFU's {name}.json, got {', '.join(there) or 'no *_perturbed file'}; "
        "choose another --split or --data"
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
        rows: the rows of the split.
        logprobs: for each row, the mean token log-probability of each of its ``candidates``.
        generations: for each row, ``input``, ``generation`` and the ROUGE scores.
        protocol: provides the formulas.

    Raises:
        FloatingPointError: a log-probability is not finite, or a truth ratio overflows.
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
    """Return a metric with probability e^l and average loss −l of every row.

    ``logprobs`` is l, of shape (rows,) or (rows, answers).
    """
    probability = np.exp(logprobs)
    rows = zip(probability.tolist(), (-logprobs).tolist(), strict=True)
    return metric_of(float(probability.mean()), ({"prob": prob, "avg_loss": loss} for prob, loss in rows))


def _refuse_infinite(split: str, rows: TofuRows, logprobs: Sequence[Sequence[float]]) -> None:
    for row, (values, candidates) in enumerate(zip(logprobs, rows.candidates(), strict=True)):
        for value, text in zip(values, candidates, strict=True):
            if not np.isfinite(value):
                raise FloatingPointError(
                    f"{split}, row {row}: expected a finite mean log-probability of the answer {text[:60]!r}, got "
                    f"{value}; if the weights are not finite, check the training run; if activations overflow, "
                    "evaluate in bfloat16 or float32"
                )


def _refuse_overflow(split: str, ratios: FloatArray) -> None:
    if (bad := np.flatnonzero(~np.isfinite(ratios))).size:
        raise FloatingPointError(
            f"{split}, row {bad[0]}: expected a finite truth ratio, got {ratios[bad[0]]}, because the model gives the "
            "true answer a probability of 0; this protocol cannot evaluate the model"
        )


@dataclass(frozen=True)
class TofuResult:
    """The result of an evaluation.

    Attributes:
        log: per-row results, the input of ``model_utility``, ``forget_quality`` and reports.
        summary: values by open-unlearning's names: ``model_utility``, ``forget_quality``, ``forget_Q_A_Prob``, …. Only
            metrics of the evaluated splits are included, and ``forget_quality`` only with a retain log.
        content: the content of ``TOFU_EVAL.json``, in open-unlearning's schema.
        empty: for each split, how many generations contain no word for ROUGE, so that their ROUGE is 0.
    """

    log: EvalLog
    summary: dict[str, float]
    content: dict[str, MetricResult]
    empty: dict[str, int]


class TofuEvaluation:
    """TOFU's evaluation on one data set, which can be applied to any number of models.

    A call with a model returns the summary. The object can therefore be used as a callback's evaluation during
    training, on every process::

        evaluate = TofuEvaluation(tokenizer, split="forget10", retain_log="retain90/TOFU_EVAL.json")
        UnlearnTrainer(..., callbacks=[EvaluateCallback(evaluate), KeepBest("forget_quality", ("model_utility", 0.5))])

    Args:
        tokenizer: the models' tokenizer.
        data: a folder with TOFU's files (``forget10_perturbed.json``, ``retain_perturbed.json``, …), a data set on the
            Hub with configurations of these names, or None for ``locuslab/TOFU``.
        split: the forget split: forget01, forget05, forget10, or another forget split of the data set.
        splits: which of forget, retain, real_authors and world_facts to evaluate. Model Utility needs the last three,
            Forget Quality the first.
        protocol: "open-unlearning", "tofu", or a ``Protocol``.
        compat: "open-unlearning" to reproduce that system's labels, prompts and attention mask exactly. This is slow.
        retain_log: the log of a model trained only on the retain set, or its path; None omits Forget Quality.
        template: see ``efface.hf.text.templates``.
        token_budget: maximum tokens of a forward pass. It affects memory and speed, and results only by rounding.

    Raises:
        FileNotFoundError: the data or the retain log does not exist.
        ValueError: an unknown split or protocol, rows that cannot be evaluated, or a retain log of other rows; also as
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
        """Evaluate a model and return the summary."""
        return self.evaluate(model).summary

    def evaluate(
        self, model: Any, *, store: str | Path | None = None, progress: Progress | None = None, source: str = "model"
    ) -> TofuResult:
        """Evaluate a model. On several processes, every process must call this method and gets the result.

        Args:
            model: a causal language model, fused or not.
            store: file that keeps finished rows; see ``run_tasks``.
            progress: see ``run_tasks``.
            source: name of the log in messages.

        Raises:
            FloatingPointError: a log-probability is not finite, or a truth ratio overflows.
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
        """Return the retain log after checking that Forget Quality can be computed with it."""
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
        """Raise ValueError if the log's ``EVAL_CONFIG.json`` records another protocol or template."""
        config_path = log.with_name(CONFIG)
        if log.name != EVAL or not config_path.is_file():
            return
        content = read_json(config_path, "settings of an evaluation")
        for part, own in (("protocol", asdict(self.protocol)), ("template", asdict(self.template))):
            theirs = content.get(part) if isinstance(content, dict) else None
            if not isinstance(theirs, dict):
                continue
            differ = [name for name in own if name != "name" and name in theirs and theirs[name] != own[name]]
            if differ:
                raise ValueError(
                    f"`retain_log`: expected the {part} of this evaluation, got another one in {str(log)!r} "
                    f"({differ[0]} is {theirs[differ[0]]!r} there and {own[differ[0]]!r} here); evaluate the retain "
                    "model with the settings of this evaluation"
                )

    def facts(self) -> dict[str, Any]:
        """Return the data and settings of the evaluation as JSON-compatible values."""
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
    """Evaluate a model on TOFU. For details and errors see ``TofuEvaluation`` and its ``evaluate``.

    Args:
        model: a causal language model, fused or not.
        tokenizer: its tokenizer.
        data: a folder with TOFU's files, a data set on the Hub, or None for ``locuslab/TOFU``.
        split: the forget split.
        splits: which of the four splits to evaluate.
        protocol: "open-unlearning", "tofu", or a ``Protocol``.
        compat: "open-unlearning" to reproduce that system's labels, prompts and attention mask exactly.
        retain_log: log of the retain model, which Forget Quality compares with; None omits Forget Quality.
        template: see ``efface.hf.text.templates``.
        token_budget: maximum tokens of a forward pass.
        output: a folder for ``TOFU_EVAL.json`` and ``TOFU_SUMMARY.json`` in open-unlearning's schema, and for
            ``EVAL_CONFIG.json``, which records the model, data and settings. The folder also keeps finished rows, so
            that a killed evaluation can resume.
        overwrite: whether to replace results that are already in ``output``. If false, results of another model or
            with other settings raise FileExistsError, and other metrics of the same model and settings are kept.
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
