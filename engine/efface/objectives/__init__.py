"""Objectives: what a run minimises. One file an objective; ``base`` says what one is."""

from efface.objectives.base import Objective, StepTerms
from efface.objectives.grad_ascent import GradAscent, GradDiff
from efface.objectives.npo import NPO
from efface.objectives.registry import get_objective, known_objectives, register_objective
from efface.objectives.simnpo import SimNPO

__all__ = [
    "NPO",
    "GradAscent",
    "GradDiff",
    "Objective",
    "SimNPO",
    "StepTerms",
    "get_objective",
    "known_objectives",
    "register_objective",
]
