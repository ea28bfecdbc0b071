"""Unlearning objectives, the losses that a run minimises; ``base`` defines the class ``Objective``."""

from efface.objectives.base import (
    Objective,
    check_term,
    get_objective,
    known_objectives,
    register_objective,
    step_terms,
)
from efface.objectives.logprobs import (
    CEU,
    DPO,
    NPO,
    WGA,
    FunctionObjective,
    GradAscent,
    GradDiff,
    IdkNLL,
    SatImp,
    SimNPO,
    as_objective,
)
from efface.objectives.pdu import PDU
from efface.objectives.rmu import RMU
from efface.objectives.undial import UNDIAL

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
    "as_objective",
    "check_term",
    "get_objective",
    "known_objectives",
    "register_objective",
    "step_terms",
]
