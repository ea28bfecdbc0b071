"""Forget Quality: can the unlearned model be told from one that never saw the forget set? (arXiv 2401.06121, 2.2.2)."""

import warnings

from scipy.stats import ks_2samp

from efface.evaluate.logs import EvalLog


def forget_quality(log: EvalLog, retain_log: EvalLog) -> float:
    """Return the p-value of the two-sample Kolmogorov-Smirnov test between the truth ratios on the forget split.

    Near 0: surely another distribution than that of the model trained on the retain set alone. Above 0.05: not
    distinguishable.

    Args:
        log: of the model to judge.
        retain_log: of a model trained on the retain set only, on the same forget split.

    Raises:
        ValueError: a log without truth ratios on the forget split, or with values that are not finite.

    Warns:
        UserWarning: logs with different numbers of rows, which cannot be of the same forget split.
    """
    judged, retained = log.rows("forget", "truth_ratio"), retain_log.rows("forget", "truth_ratio")
    if len(judged) != len(retained):
        warnings.warn(
            f"forget quality compares {len(judged)} rows of {log.source} with {len(retained)} rows of "
            f"{retain_log.source}; both should be of the same forget split",
            stacklevel=2,
        )
    return float(ks_2samp(judged, retained).pvalue)
