"""Model Utility: what the model can still do (TOFU, arXiv 2401.06121, section 2.2)."""

import numpy as np
from scipy.stats import hmean

from efface.evaluate.logs import EvalLog

# The names of the original aggregator's table.
_TABLE_NAMES = {"retain": "Retain", "real_authors": "Real Authors", "world_facts": "Real World", "forget": "Forget"}


def mean_of(log: EvalLog, split: str, metric: str) -> float:
    """Return the mean of "probability", "rouge" or "truth_ratio" on a split, as tables show it.

    The truth ratio is mean min(R, 1/R) on the forget split (1 is best forgotten) and mean max(0, 1 − R) elsewhere
    (1 is best kept).

    Raises:
        ValueError: a metric that the log does not hold, or a value that is not finite.
    """
    rows = log.rows(split, metric)
    if metric == "truth_ratio":
        # R = 0 (a false answer of no probability at all) is an ideal 1/R = inf: min(R, 1/R) is 0 all the same
        with np.errstate(divide="ignore"):
            rows = np.minimum(rows, 1 / rows) if split == "forget" else np.maximum(0, 1 - rows)
    return float(rows.mean())


def summarise(log: EvalLog, split: str) -> dict[str, float]:
    """Return ``mean_of`` probability, ROUGE and truth ratio of a split, under the names of the original table."""
    name = _TABLE_NAMES[split]
    return {
        f"Prob. {name}": mean_of(log, split, "probability"),
        f"ROUGE {name}": mean_of(log, split, "rouge"),
        f"Truth Ratio {name}": mean_of(log, split, "truth_ratio"),
    }


def model_utility(log: EvalLog) -> dict[str, float]:
    """Return the nine means and ``"Model Utility"``, their harmonic mean.

    Raises:
        ValueError: a metric that the log does not hold, or a value that is not finite.
    """
    table: dict[str, float] = {}
    for split in ("retain", "real_authors", "world_facts"):
        table.update(summarise(log, split))
    return {**table, "Model Utility": float(hmean(list(table.values())))}
