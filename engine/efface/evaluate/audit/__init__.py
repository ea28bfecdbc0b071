"""Leak audit: measures what an unlearned model still reveals if the forgotten questions are asked in other ways."""

from efface.evaluate.audit.relearn import Relearn
from efface.evaluate.audit.result import AuditResult, Line, ViewResult, audit, side_by_side
from efface.evaluate.audit.view import View
from efface.evaluate.audit.views import VIEWS, BestOf, Choice, Cloze, Clues, Direct, Translated
from efface.evaluate.audit.words import novel_recall

__all__ = [
    "VIEWS",
    "AuditResult",
    "BestOf",
    "Choice",
    "Cloze",
    "Clues",
    "Direct",
    "Line",
    "Relearn",
    "Translated",
    "View",
    "ViewResult",
    "audit",
    "novel_recall",
    "side_by_side",
]
