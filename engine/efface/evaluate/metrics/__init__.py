"""Metrics of unlearning behind one registry; see README.md for what each equals."""

from efface.evaluate.metrics.attack import Attack, auc
from efface.evaluate.metrics.base import Metric, MetricResult
from efface.evaluate.metrics.exact_memorization import ExactMemorization
from efface.evaluate.metrics.extraction_strength import ExtractionStrength
from efface.evaluate.metrics.fame import fame, fame_table
from efface.evaluate.metrics.mia_loss import MiaLoss
from efface.evaluate.metrics.mia_min_k import MiaMinK
from efface.evaluate.metrics.mia_min_k_plus_plus import MiaMinKPlusPlus
from efface.evaluate.metrics.mia_reference import MiaReference
from efface.evaluate.metrics.mia_zlib import MiaZlib
from efface.evaluate.metrics.part import Part, Reading
from efface.evaluate.metrics.perplexity import Perplexity
from efface.evaluate.metrics.privleak import PrivLeak
from efface.evaluate.metrics.probability import Probability
from efface.evaluate.metrics.registry import get_metric, known_metrics, register_metric
from efface.evaluate.metrics.rouge import Rouge
from efface.evaluate.metrics.run import evaluate_metrics, qa_rouge
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
