"""The two numbers by which unlearning is judged (TOFU, arXiv 2401.06121, section 2.2).

Forget Quality: can the model be told from one that never saw the forget set? Model Utility: what can it still do?
"""

from scipy.stats import hmean, ks_2samp

from efface.evaluate.logs import EvalLog, SplitLog
from efface.evaluate.protocol import PROTOCOLS
from efface.hf.text.templates import TOFU

# The names of the original aggregator's table.
_SPLIT_TITLES = {"retain": "Retain", "real_authors": "Real Authors", "world_facts": "Real World"}
_METRIC_TITLES = {"probability": "Prob.", "rouge": "ROUGE", "truth_ratio": "Truth Ratio"}


def forget_quality(log: EvalLog, retain_log: EvalLog, *, strict: bool = True) -> float:
    """Return the p-value of the two-sample Kolmogorov-Smirnov test between the truth ratios on the forget split.

    Near 0: surely another distribution than that of the model trained on the retain set alone. Above 0.05: not
    distinguishable.

    Args:
        log: of the model to judge.
        retain_log: of a model trained on the retain set only, on the same forget split.
        strict: False compares logs of different rows too, as TOFU's aggregator does; the p-value is then also about
            what the questions differ in.

    Raises:
        ValueError: a log without truth ratios on the forget split, or with values that are not finite; logs that are
            not of the same rows, unless ``strict`` is False.
    """
    judged, retained = log.rows("forget", "truth_ratio"), retain_log.rows("forget", "truth_ratio")
    if strict:
        check_same_rows(log, retain_log)
    return float(ks_2samp(judged, retained).pvalue)


def check_same_rows(log: EvalLog, retain_log: EvalLog) -> None:
    """Raise ValueError if two logs are of different forget rows, as far as they tell.

    They tell by how many there are, by their names, and by their true answers.
    """
    difference = _difference(log, retain_log)
    if difference is not None:
        raise ValueError(
            f"forget quality compares rows of one forget split, but {difference}. Evaluate both models on the same "
            "split under the same protocol, or call forget_quality with strict=False to compare them all the same"
        )


def _difference(log: EvalLog, retain_log: EvalLog) -> str | None:
    ours, theirs = log.splits["forget"], retain_log.splits["forget"]
    if _count(ours) != _count(theirs):
        return f"{log.source} has {_count(ours)} of them and {retain_log.source} has {_count(theirs)}"
    if ours.index is not None and theirs.index is not None and (alone := set(ours.index) ^ set(theirs.index)):
        row = min(alone, key=lambda name: (len(name), name))
        return f"row {row} is only in one of {log.source} and {retain_log.source}"
    known = theirs.answers or {}
    for row, answer in (ours.answers or {}).items():
        if row in known and not _same(answer, known[row]):
            return f"the answer of row {row} is {answer!r} in {log.source} and {known[row]!r} in {retain_log.source}"
    return None


def _count(split: SplitLog) -> int:
    known = split.index if split.truth_ratio is None else split.truth_ratio
    return 0 if known is None else len(known)


def _same(a: str, b: str) -> bool:
    """Whether two logs mean one answer: tokenizers space it differently, and some logs put the prompt before it."""
    short, long = sorted(("".join(filter(str.isalnum, text)).casefold() for text in (a, b)), key=len)
    return long.endswith(short)


def mean_of(log: EvalLog, split: str, metric: str) -> float:
    """Return the mean of "probability", "rouge" or "truth_ratio" on a split, as tables show it.

    The truth ratio is mean min(R, 1/R) on the forget split (1 is best forgotten) and mean max(0, 1 − R) elsewhere
    (1 is best kept).

    Raises:
        ValueError: a metric that the log does not hold, or a value that is not finite.
    """
    rows = log.rows(split, metric)
    if metric != "truth_ratio":
        return float(rows.mean())
    return PROTOCOLS[TOFU].forgotten(rows) if split == "forget" else PROTOCOLS[TOFU].kept(rows)


def model_utility(log: EvalLog) -> dict[str, float]:
    """Return the nine means and ``"Model Utility"``, their harmonic mean.

    Raises:
        ValueError: a metric that the log does not hold, or a value that is not finite.
    """
    table = {
        f"{title} {split_title}": mean_of(log, split, metric)
        for split, split_title in _SPLIT_TITLES.items()
        for metric, title in _METRIC_TITLES.items()
    }
    return {**table, "Model Utility": float(hmean(list(table.values())))}
