"""Objectives: what a run minimises. One file an objective; ``base`` says what one is."""

from efface.objectives.base import Objective, StepTerms
from efface.objectives.ceu import CEU
from efface.objectives.custom import FunctionObjective
from efface.objectives.dpo import DPO
from efface.objectives.grad_ascent import GradAscent, GradDiff
from efface.objectives.idk_nll import IdkNLL
from efface.objectives.npo import NPO
from efface.objectives.pdu import PDU
from efface.objectives.registry import get_objective, known_objectives, register_objective
from efface.objectives.rmu import RMU
from efface.objectives.satimp import SatImp
from efface.objectives.simnpo import SimNPO
from efface.objectives.undial import UNDIAL
from efface.objectives.wga import WGA

__all__ = [
    "CEU",
    "DPO",
    "NPO",
    "PDU",
    "RMU",
    "UNDIAL",
    "WGA",
    "FunctionObjective",
    "GradAscent",
    "GradDiff",
    "IdkNLL",
    "Objective",
    "SatImp",
    "SimNPO",
    "StepTerms",
    "get_objective",
    "known_objectives",
    "register_objective",
]
