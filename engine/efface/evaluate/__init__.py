"""Evaluation: what a model still knows, and the two numbers by which unlearning is judged."""

from efface.evaluate.likelihood import answer_logprobs, score_rows
from efface.evaluate.logs import EvalLog, SplitLog, read_log
from efface.evaluate.quality import forget_quality
from efface.evaluate.report import report
from efface.evaluate.runner import run_tasks
from efface.evaluate.task import RowResult, Task
from efface.evaluate.utility import model_utility

__all__ = [
    "EvalLog",
    "RowResult",
    "SplitLog",
    "Task",
    "answer_logprobs",
    "forget_quality",
    "model_utility",
    "read_log",
    "report",
    "run_tasks",
    "score_rows",
]
