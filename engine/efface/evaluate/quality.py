"""Forget Quality and Model Utility, the two headline numbers of TOFU (arXiv 2401.06121, section 2.2).

Forget Quality measures whether the model can be distinguished from one that never saw the forget set. Model Utility
measures how well it still performs on everything else.
"""

from scipy.stats import hmean, ks_2samp

from efface.evaluate.logs import EvalLog, SplitLog
from efface.evaluate.protocol import PROTOCOLS
from efface.hf.text.templates import TOFU

# As in the table of TOFU's own aggregator.
_SPLIT_TITLES = {"retain": "Retain", "real_authors": "Real Authors", "world_facts": "Real World"}
_METRIC_TITLES = {"probability": "Prob.", "rouge": "ROUGE", "truth_ratio": "Truth Ratio"}


def forget_quality(log: EvalLog, retain_log: EvalLog, *, strict: bool = True) -> float:
    """Return the p-value of the two-sample Kolmogorov-Smirnov test between the truth ratios on the forget split.

    Near 0, the distribution clearly differs from that of the model trained only on the retain set. Above 0.05, the two
    cannot be distinguished.

    Args:
        log: log of the model to evaluate.
        retain_log: log of a model trained only on the retain set, on the same forget split.
        strict: whether to require that both logs have the same rows. TOFU's aggregator does not require it; the
            p-value then also depends on differences between the questions.

    Raises:
        ValueError: a log has no truth ratios on the forget split, or has values that are not finite; or the logs have
            different rows and ``strict`` is true.
    """
    evaluated, retained = log.rows("forget", "truth_ratio"), retain_log.rows("forget", "truth_ratio")
    if strict:
        check_same_rows(log, retain_log)
    return float(ks_2samp(evaluated, retained).pvalue)


def check_same_rows(log: EvalLog, retain_log: EvalLog) -> None:
    """Raise ValueError if two logs have different forget rows.

    The check compares the number of rows and, where both logs contain them, the indices and the true answers.
    """
    difference = _difference(log, retain_log)
    if difference is not None:
        raise ValueError(
            f"forget quality: expected logs of the same forget rows, but {difference}; evaluate both models on the "
            "same split under the same protocol, or call forget_quality with strict=False to skip this check"
        )


def _difference(log: EvalLog, retain_log: EvalLog) -> str | None:
    ours, theirs = log.splits["forget"], retain_log.splits["forget"]
    if _count(ours) != _count(theirs):
        return f"{log.source} has {_count(ours)} rows and {retain_log.source} has {_count(theirs)}"
    if ours.index is not None and theirs.index is not None and (alone := set(ours.index) ^ set(theirs.index)):
        row = min(alone, key=lambda name: (len(name), name))
        return f"row {row} is in only one of {log.source} and {retain_log.source}"
    known = theirs.answers or {}
    for row, answer in (ours.answers or {}).items():
        if row in known and not _same(answer, known[row]):
            return f"the answer of row {row} is {answer!r} in {log.source} and {known[row]!r} in {retain_log.source}"
    return None


def _count(split: SplitLog) -> int:
    known = split.index if split.truth_ratio is None else split.truth_ratio
    return 0 if known is None else len(known)


def _same(a: str, b: str) -> bool:
    """Return whether the letters and digits of one text end with those of the other.

    Tokenizers space the same answer differently, and some logs put the prompt before it.
    """
    short, long = sorted(("".join(filter(str.isalnum, text)).casefold() for text in (a, b)), key=len)
    return long.endswith(short)


def mean_of(log: EvalLog, split: str, metric: str) -> float:
    """Return the mean of "probability", "rouge" or "truth_ratio" on a split, as tables show it.

    The truth ratio is mean min(R, 1/R) on the forget split (1 means best forgotten) and mean max(0, 1 − R) on the
    other splits (1 means best kept).

    Raises:
        ValueError: the log does not contain the metric, or a value is not finite.
    """
    rows = log.rows(split, metric)
    if metric != "truth_ratio":
        return float(rows.mean())
    return PROTOCOLS[TOFU].forgotten(rows) if split == "forget" else PROTOCOLS[TOFU].kept(rows)


def model_utility(log: EvalLog) -> dict[str, float]:
    """Return the nine means of retain, real authors and world facts, and ``"Model Utility"``, their harmonic mean.

    Raises:
        ValueError: the log does not contain a metric, or a value is not finite.
    """
    table = {
        f"{title} {split_title}": mean_of(log, split, metric)
        for split, split_title in _SPLIT_TITLES.items()
        for metric, title in _METRIC_TITLES.items()
    }
    return {**table, "Model Utility": float(hmean(list(table.values())))}
