"""Reading of TOFU's and open-unlearning's evaluation logs into one form in memory, and writing of open-unlearning's.

A metric in open-unlearning's schema is ``{"agg_value": …, "value_by_index": {"0": {…}, …}}``. ``TOFU_EVAL.json``
contains every metric, ``TOFU_SUMMARY.json`` only each metric's ``agg_value``. open-unlearning's tools read both;
``read_log`` reads the first. ``EVAL_CONFIG.json``, which those tools ignore, records the model, the data and the
settings of the results.

R is the truth ratio of a row, P(perturbed) / P(paraphrased) with P = exp(−mean token NLL). It is 1 if the model finds
true and false answers equally likely, and near 0 if it knows the true one. P(perturbed) is the geometric mean over the
row's false answers (their losses are averaged), as in open-unlearning and in TOFU's own aggregator.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from accelerate.utils import extract_model_from_parallel
from numpy.typing import NDArray

from efface.files import write_whole
from efface.hf.model.fingerprint import fingerprint
from efface.hf.train.record import versions

FloatArray = NDArray[np.float64]
MetricResult: TypeAlias = dict[str, Any]
"""Open-unlearning's schema: ``{"agg_value": …, "value_by_index": {"0": {"score": …}, …}}``."""

EVAL, SUMMARY, CONFIG = "TOFU_EVAL.json", "TOFU_SUMMARY.json", "EVAL_CONFIG.json"
SPLITS = ("retain", "real_authors", "world_facts", "forget")

_ORIGINAL_FILES = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
PREFIXES = {"retain": "retain", "real_authors": "ra", "world_facts": "wf", "forget": "forget"}


@dataclass(frozen=True)
class SplitLog:
    """Per-row results on one split. Each is None if the log does not contain it.

    Attributes:
        probability: (rows,) exp(−mean token NLL) of the answer; for real authors and world facts the share
            p(correct) / Σ p(choices).
        truth_ratio: (rows,) R.
        rouge: (rows,) ROUGE-L recall of the greedy generation.
        index: the log's row index of each truth ratio.
        answers: the true answers by the log's row index.
    """

    probability: FloatArray | None = None
    truth_ratio: FloatArray | None = None
    rouge: FloatArray | None = None
    index: tuple[str, ...] | None = None
    answers: Mapping[str, str] | None = None


@dataclass(frozen=True)
class EvalLog:
    """Results by split: "retain", "real_authors", "world_facts" and "forget". Errors call the log by ``source``."""

    splits: Mapping[str, SplitLog]
    source: str = "log"

    def rows(self, split: str, metric: str) -> FloatArray:
        """Return the per-row values of a metric.

        Raises:
            ValueError: the log does not contain the metric, has no rows of it, or has a value that is not finite.
        """
        values: FloatArray | None = getattr(self.splits.get(split, SplitLog()), metric)
        if values is None:
            raise ValueError(
                f"{self.source}: expected {metric} for the {split} split, got none; evaluate the split first"
            )
        if not len(values):
            raise ValueError(f"{self.source}: expected rows of {metric} for the {split} split, got none")
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise ValueError(
                f"{self.source}: expected finite {metric} for the {split} split, got {values[bad[0]]} at row {bad[0]} "
                f"({bad.size} of {len(values)} rows are not finite); the model's log-probabilities overflowed"
            )
        return np.asarray(values, dtype=np.float64)


def truth_ratios(paraphrased: FloatArray, perturbed: FloatArray) -> FloatArray:
    """Return R (rows,), the truth ratios, from mean token log-probabilities.

    Args:
        paraphrased: (rows,) of the paraphrased answers.
        perturbed: (rows, answers) of the false answers.
    """
    with np.errstate(over="ignore"):  # EvalLog.rows reports an overflow with its row
        ratios: FloatArray = np.exp(perturbed.mean(axis=1) - paraphrased)
    return ratios


def read_log(path: str | Path) -> EvalLog:
    """Read TOFU's ``eval_log_aggregated.json`` or open-unlearning's ``TOFU_EVAL.json``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has neither format.
    """
    return log_of(read_json(path, "evaluation log"), str(Path(path).expanduser()))


def read_json(path: str | Path, name: str) -> Any:
    """Return the content of a JSON file.

    Args:
        path: the file.
        name: the kind of file, for messages.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not valid JSON in UTF-8.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{name} {str(path)!r} does not exist; check the path")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # invalid JSON or UTF-8
        raise ValueError(f"{str(path)!r}: expected a JSON file, got something else ({error})") from error


def log_of(content: Any, source: str) -> EvalLog:
    """Return the log in the JSON content of a file. ``source`` is its name in messages.

    Raises:
        ValueError: the content has neither TOFU's nor open-unlearning's format.
    """
    try:
        splits = _splits(content)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{source!r}: expected rows in the format of TOFU or open-unlearning, got another format "
            f"({type(error).__name__}: {error}); evaluate again"
        ) from error
    if splits is None:
        got = ", ".join(map(str, list(content)[:4])) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{source!r}: expected the keys of TOFU's eval_log_aggregated.json ({_ORIGINAL_FILES['forget']}, …) or "
            f"of open-unlearning's TOFU_EVAL.json (forget_truth_ratio, …), got {got or 'none'}; evaluate again"
        )
    return EvalLog(splits, source=source)


def _splits(content: Any) -> dict[str, SplitLog] | None:
    if isinstance(content, dict) and content.keys() & set(_ORIGINAL_FILES.values()):
        return {
            split: _original_split(content[file], split) for split, file in _ORIGINAL_FILES.items() if file in content
        }
    if isinstance(content, dict) and any(_is_open_unlearning(name) for name in content):
        return {split: _open_unlearning_split(content, prefix) for split, prefix in PREFIXES.items()}
    return None


def _numbers(values: Iterable[Any]) -> FloatArray:
    found = np.array(list(values), dtype=np.float64)
    if found.ndim != 1:
        raise ValueError(f"expected one number per row, got an array of {found.ndim} dimensions")
    return found


def _column(metrics: Mapping[str, Any], name: str) -> FloatArray | None:
    return _numbers(metrics[name].values()) if name in metrics else None


def _original_split(metrics: Mapping[str, Any], split: str) -> SplitLog:
    answer, perturbed = _column(metrics, "avg_gt_loss"), metrics.get("average_perturb_loss")
    perturbed = None if perturbed is None else np.array(list(perturbed.values()), dtype=np.float64)  # (rows, answers)
    paraphrased = _column(metrics, "avg_paraphrased_loss")
    probability = None if answer is None else np.exp(-answer)
    if split in ("real_authors", "world_facts") and probability is not None and perturbed is not None:
        probability = probability / (probability + np.exp(-perturbed).sum(axis=1))
    ratios = None if perturbed is None or paraphrased is None else truth_ratios(-paraphrased, -perturbed)
    index = None if ratios is None else tuple(metrics["average_perturb_loss"])
    # each entry of "generated_text": prompt, generation, true answer
    answers = {row: texts[2] for row, texts in metrics.get("generated_text", {}).items()}
    return SplitLog(probability, ratios, _column(metrics, "rougeL_recall"), index, answers or None)


def _is_open_unlearning(name: str) -> bool:
    return name.lower().endswith(("_truth_ratio", "_q_a_prob", "_q_a_rouge", "_q_a_prob_normalised"))


def _open_unlearning_split(content: Mapping[str, Any], prefix: str) -> SplitLog:
    # The case of the keys differs between versions: forget_truth_ratio, retain_Truth_Ratio.
    metrics = {name.lower(): value for name, value in content.items() if isinstance(value, Mapping)}

    def fields(name: str, field: str) -> dict[str, Any] | None:
        metric = metrics.get(f"{prefix}_{name}".lower())
        if metric is None or "value_by_index" not in metric:
            return None
        # open-unlearning writes null for rows that it could not score, and leaves them out of its means
        rows = {index: row for index, row in metric["value_by_index"].items() if row is not None}
        return {index: row[field] for index, row in rows.items() if row.get(field) is not None}

    def values(name: str, field: str) -> FloatArray | None:
        found = fields(name, field)
        return None if found is None else _numbers(found.values())

    ratios = fields("Truth_Ratio", "score")
    return SplitLog(
        probability=values("Q_A_Prob_normalised" if prefix in ("ra", "wf") else "Q_A_Prob", "prob"),
        truth_ratio=values("Truth_Ratio", "score"),
        rouge=values("Q_A_ROUGE", "rougeL_recall"),
        index=None if ratios is None else tuple(ratios),
        answers=fields("Q_A_ROUGE", "ground_truth") or None,
    )


def metric_of(value: float, rows: Iterable[Mapping[str, Any]]) -> MetricResult:
    """Return a metric in open-unlearning's schema, from its aggregate value and its values for each row."""
    return {"agg_value": value, "value_by_index": {str(number): row for number, row in enumerate(rows)}}


def summary_of(content: Mapping[str, MetricResult]) -> dict[str, float]:
    """Return the ``agg_value`` of every metric that has one, by name."""
    return {name: metric["agg_value"] for name, metric in content.items() if metric["agg_value"] is not None}


def model_facts(model: Any) -> dict[str, Any]:
    """Return the model's name, fingerprint and dtype and the versions of the software, as JSON-compatible values."""
    model = extract_model_from_parallel(model)
    return {
        "model": str(model.config._name_or_path),  # noqa: SLF001 - transformers stores it nowhere else
        "fingerprint": fingerprint(model).hex(),
        "dtype": str(model.dtype),
        "versions": versions(),
    }


def result_names(benchmark: str = "TOFU") -> tuple[str, str, str]:
    """Return the file names of the results, their summary and their configuration."""
    if benchmark == "TOFU":
        return EVAL, SUMMARY, CONFIG
    results, summary, config = (f"{benchmark}_{name.partition('_')[2]}" for name in (EVAL, SUMMARY, CONFIG))
    return results, summary, config


def check_results(folder: Path, config: Mapping[str, Any], *, benchmark: str = "TOFU") -> None:
    """Raise FileExistsError if the folder contains results of another model or with other settings.

    Args:
        folder: the output folder.
        config: the model, data and settings of the new results.
        benchmark: see ``write_results``.
    """
    results, _, name = result_names(benchmark)
    if not (folder / results).is_file():
        return
    found = read_json(folder / name, "configuration of results") if (folder / name).is_file() else {}
    before = found if isinstance(found, dict) else {}
    remedy = "choose another --output, or add --overwrite"
    where = f"output folder {str(folder)!r}: contains results ({results}) of"
    if before.get("fingerprint") != config["fingerprint"]:
        was, now = (
            f"{each.get('model', 'unknown')!r} ({each.get('dtype')}, fingerprint {str(each.get('fingerprint'))[:8]})"
            for each in (before, config)
        )
        raise FileExistsError(f"{where} another model, {was}; this model is {now}; {remedy}")
    old, new = _settings(before), _settings(config)
    for main, others in _OPTIONAL.items():  # an option that only one side used is no contradiction
        if None in (old.get(main), new.get(main)):
            for key in (main, *others):
                old.pop(key, None)
                new.pop(key, None)
    changes = [
        f"{key}: was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changes:
        raise FileExistsError(f"{where} the same model with other settings: {'; '.join(changes)}; {remedy}")


# Parts of a configuration that do not change existing numbers, or that follow from other parts.
_NO_SETTINGS = {"model", "versions", "rows", "empty_generations", "retain_log", "options", "content"}
# The flags of `efface evaluate` that change the numbers of metrics on any data set.
_OPTIONS = (
    *("forget", "forget_filter", "holdout", "holdout_filter", "retain_filter", "reference_model", "retain_metrics"),
    *("group_columns", "question_column", "answer_column", "max_length", "window", "max_new_tokens", "template"),
)
# Options that only some metrics need, each with the options that depend on it.
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "holdout": ("holdout_filter",),
    **dict.fromkeys(("reference_model", "retain_metrics", "window"), ()),
    **{f"content of {name}": () for name in ("forget", "holdout", "data")},  # unknown unless the data was a file
}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(config))
    options = plain.get("options", {})
    own = {name: value for name, value in plain.items() if name not in _NO_SETTINGS}
    content = {f"content of {name}": digest for name, digest in plain.get("content", {}).items()}
    return own | content | {name: options.get(name) for name in _OPTIONS if options}


def write_results(
    folder: Path,
    content: Mapping[str, MetricResult],
    config: Mapping[str, Any],
    *,
    benchmark: str = "TOFU",
    beside: bool = False,
) -> None:
    """Write the results, their summary and their configuration. Each file is written atomically.

    Args:
        folder: created if it does not exist.
        content: metrics by name.
        config: the model, data and settings of the metrics.
        benchmark: prefix of the file names, if not "TOFU".
        beside: keep metrics that are already in the files and have other names. Call ``check_results`` first to make
            sure that they have the same model and settings.
    """
    names = result_names(benchmark)
    if beside and (folder / names[0]).is_file():
        content = {**read_json(folder / names[0], "results file"), **content}
        config = _merged(read_json(folder / names[2], "configuration of results"), config)
    for name, value in zip(names, (content, summary_of(content), config), strict=True):
        text = json.dumps(value, indent=4, sort_keys=value is not config, allow_nan=False)
        write_whole(folder / name, f"{text}\n")


def _merged(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of old and new results together."""
    merged = {**now}
    for name in ("rows", "empty_generations", "options", "content"):
        if isinstance(before.get(name), dict) and isinstance(now.get(name), dict):
            given = {key: value for key, value in now[name].items() if value is not None or key not in before[name]}
            merged[name] = {**before[name], **given}
    if isinstance(now.get("options"), dict):
        metrics = (each["options"].get("metrics") or "" for each in (before, now))
        merged["options"]["metrics"] = ",".join(dict.fromkeys(",".join(metrics).strip(",").split(","))) or None
    if now.get("retain_log", "") is None:
        merged["retain_log"] = before.get("retain_log")
    return merged
