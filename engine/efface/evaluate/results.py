"""Results in open-unlearning's schema: a metric is ``{"agg_value": …, "value_by_index": {"0": {…}, …}}``.

``TOFU_EVAL.json`` holds every metric, ``TOFU_SUMMARY.json`` their ``agg_value``; its tools read both, and so does
``read_log``. What the numbers are of is in ``EVAL_CONFIG.json``, which those tools do not look for.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import extract_model_from_parallel

from efface.evaluate.logs import PREFIXES, FloatArray
from efface.evaluate.protocol import Protocol
from efface.evaluate.runner import RowResult
from efface.evaluate.tofu_rows import TofuRows
from efface.files import write_whole
from efface.hf.model.fingerprint import fingerprint
from efface.hf.train.record import versions

EVAL, SUMMARY, CONFIG = "TOFU_EVAL.json", "TOFU_SUMMARY.json", "EVAL_CONFIG.json"

Metric = dict[str, Any]


def split_metrics(
    split: str,
    rows: TofuRows,
    logprobs: Sequence[Sequence[float]],
    generations: Sequence[RowResult],
    protocol: Protocol,
) -> dict[str, Metric]:
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
        f"{prefix}_Q_A_ROUGE": {
            "agg_value": float(np.mean([row["rougeL_recall"] for row in generations])),
            "value_by_index": _by_index(
                {**row, "ground_truth": answer} for row, answer in zip(generations, rows.answers, strict=True)
            ),
        },
        "forget_truth_ratio" if split == "forget" else f"{prefix}_Truth_Ratio": {
            "agg_value": protocol.forgotten(ratios) if split == "forget" else protocol.kept(ratios),
            "value_by_index": _by_index({"score": ratio} for ratio in ratios.tolist()),
        },
    }
    if rows.paraphrases is not None:
        metrics[f"{prefix}_Q_A_PARA_Prob"] = _probabilities(true)
    if split in ("real_authors", "world_facts"):
        shares = protocol.share(answer, false)
        metrics[f"{prefix}_Q_A_Prob_normalised"] = {
            "agg_value": float(shares.mean()),
            "value_by_index": _by_index({"prob": share} for share in shares.tolist()),
        }
    return metrics


def summary_of(content: Mapping[str, Metric]) -> dict[str, float]:
    """Return the ``agg_value`` of every metric that has one, by name."""
    return {name: metric["agg_value"] for name, metric in content.items() if metric["agg_value"] is not None}


def model_facts(model: Any) -> dict[str, Any]:
    """Return which model the results are of, and what computed them, as JSON."""
    model = extract_model_from_parallel(model)
    return {
        "model": str(model.config._name_or_path),  # noqa: SLF001 - transformers keeps it nowhere else
        "fingerprint": fingerprint(model).hex(),
        "dtype": str(model.dtype),
        "versions": versions(),
    }


def write_results(
    folder: Path, content: Mapping[str, Metric], config: Mapping[str, Any], *, benchmark: str = "TOFU"
) -> None:
    """Write the three files; each is there whole or as it was, also when the process is killed.

    Those of another ``benchmark`` begin with its name.
    """
    names = [EVAL, SUMMARY, CONFIG]
    if benchmark != "TOFU":
        names = [f"{benchmark}_{name.partition('_')[2]}" for name in names]
    for name, value in zip(names, (content, summary_of(content), config), strict=True):
        write_whole(folder / name, json.dumps(value, indent=4, sort_keys=value is not config, allow_nan=False) + "\n")


def _probabilities(logprobs: FloatArray) -> Metric:
    """Probability e^l and average loss −l of every row: numbers (rows,), or lists of them (rows, answers)."""
    probability = np.exp(logprobs)
    rows = zip(probability.tolist(), (-logprobs).tolist(), strict=True)
    return {
        "agg_value": float(probability.mean()),
        "value_by_index": _by_index({"prob": prob, "avg_loss": loss} for prob, loss in rows),
    }


def _by_index(rows: Any) -> dict[str, dict[str, Any]]:
    return {str(row): values for row, values in enumerate(rows)}


def _refuse_infinite(split: str, rows: TofuRows, logprobs: Sequence[Sequence[float]]) -> None:
    for row, (values, texts) in enumerate(zip(logprobs, rows.candidates(), strict=True)):
        for value, text in zip(values, texts, strict=True):
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
