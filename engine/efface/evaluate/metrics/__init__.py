"""Metrics of unlearning, registered by name. README.md in this folder has their formulas."""

from efface.evaluate.logs import MetricResult
from efface.evaluate.metrics.base import (
    Metric,
    evaluate_metrics,
    get_metric,
    known_metrics,
    qa_rouge,
    register_metric,
)
from efface.evaluate.metrics.fame import fame, fame_table
from efface.evaluate.metrics.membership import (
    Attack,
    MiaLoss,
    MiaMinK,
    MiaMinKPlusPlus,
    MiaReference,
    MiaZlib,
    PrivLeak,
    auc,
)
from efface.evaluate.metrics.memorization import ExactMemorization, ExtractionStrength, Perplexity, Probability, Rouge
from efface.evaluate.metrics.part import Part, Reading
from efface.evaluate.metrics.token_statistics import TokenStatistics, TokenTask, token_statistics

__all__ = [
    "Attack",
    "ExactMemorization",
    "ExtractionStrength",
    "Metric",
    "MetricResult",
    "MiaLoss",
    "MiaMinK",
    "MiaMinKPlusPlus",
    "MiaReference",
    "MiaZlib",
    "Part",
    "Perplexity",
    "PrivLeak",
    "Probability",
    "Reading",
    "Rouge",
    "TokenStatistics",
    "TokenTask",
    "auc",
    "evaluate_metrics",
    "fame",
    "fame_table",
    "get_metric",
    "known_metrics",
    "qa_rouge",
    "register_metric",
    "token_statistics",
]
