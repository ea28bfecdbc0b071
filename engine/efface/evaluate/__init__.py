"""Evaluation: what a model still knows, and the two numbers by which unlearning is judged."""

from efface.evaluate.generation import GenerationTask
from efface.evaluate.likelihood import AnswerTask, answer_logprobs, mean_logprobs, score_rows, sum_logprobs
from efface.evaluate.logs import EvalLog, SplitLog, read_log
from efface.evaluate.quality import forget_quality
from efface.evaluate.rouge import rouge_recall
from efface.evaluate.sampling import Sampling
from efface.evaluate.utility import model_utility

__all__ = [
    "AnswerTask",
    "EvalLog",
    "GenerationTask",
    "Sampling",
    "SplitLog",
    "answer_logprobs",
    "forget_quality",
    "mean_logprobs",
    "model_utility",
    "read_log",
    "rouge_recall",
    "score_rows",
    "sum_logprobs",
]
