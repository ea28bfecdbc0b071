"""Evaluation of unlearned models: TOFU, Forget Quality and Model Utility, further metrics, leak audits and reports."""

from efface.extras import check_extras

check_extras("efface.evaluate", "evaluate")

from efface.evaluate.audit import audit
from efface.evaluate.decoding import Sampling
from efface.evaluate.generation import GenerationTask, rouge_recall
from efface.evaluate.likelihood import AnswerTask, answer_logprobs, mean_logprobs, score_rows, sum_logprobs
from efface.evaluate.logs import EvalLog, SplitLog, read_log
from efface.evaluate.metrics import evaluate_metrics, fame, get_metric, known_metrics, qa_rouge, register_metric
from efface.evaluate.quality import forget_quality, model_utility
from efface.evaluate.report import report
from efface.evaluate.runner import RowResult, Task, run_tasks
from efface.evaluate.tofu_evaluation import TofuEvaluation, TofuResult, tofu

__all__ = [
    "AnswerTask",
    "EvalLog",
    "GenerationTask",
    "RowResult",
    "Sampling",
    "SplitLog",
    "Task",
    "TofuEvaluation",
    "TofuResult",
    "answer_logprobs",
    "audit",
    "evaluate_metrics",
    "fame",
    "forget_quality",
    "get_metric",
    "known_metrics",
    "mean_logprobs",
    "model_utility",
    "qa_rouge",
    "read_log",
    "register_metric",
    "report",
    "rouge_recall",
    "run_tasks",
    "score_rows",
    "sum_logprobs",
    "tofu",
]
