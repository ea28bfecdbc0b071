"""Model Utility: what the model can still do (TOFU, arXiv 2401.06121, section 2.2)."""

import numpy as np
from scipy.stats import hmean

from efface.evaluate.logs import EvalLog

# The names of the original aggregator's table.
_TABLE_NAMES = {"retain": "Retain", "real_authors": "Real Authors", "world_facts": "Real World", "forget": "Forget"}


def summarise(log: EvalLog, split: str) -> dict[str, float]:
    """Return probability, ROUGE and truth ratio of a split as its table shows them.

    The truth ratio is mean min(R, 1/R) on the forget split (1 is best forgotten) and mean max(0, 1 − R) elsewhere
    (1 is best kept).
    """
    name = _TABLE_NAMES[split]
    ratio = log.rows(split, "truth_ratio")
    # R = 0 (a false answer of no probability at all) is an ideal 1/R = inf: min(R, 1/R) is 0 all the same
    with np.errstate(divide="ignore"):
        shown = np.minimum(ratio, 1 / ratio) if split == "forget" else np.maximum(0, 1 - ratio)
    return {
        f"Prob. {name}": float(log.rows(split, "probability").mean()),
        f"ROUGE {name}": float(log.rows(split, "rouge").mean()),
        f"Truth Ratio {name}": float(shown.mean()),
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
