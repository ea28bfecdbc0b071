"""efface: fast, exact unlearning for Hugging Face causal language models.

``efface.UnlearnTrainer`` runs the training, the objective classes define the losses, and ``efface.functional`` offers
the losses as functions. Importing this package imports none of its modules: each name is loaded when it is first used
(PEP 562).
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efface import evaluate, functional, objectives
    from efface.hf.train.arguments import UnlearnArguments
    from efface.hf.train.callbacks import EvaluateCallback, KeepBest, StopUnder
    from efface.hf.train.trainer import FinetuneTrainer, UnlearnTrainer
    from efface.objectives import (
        CEU,
        DPO,
        NPO,
        PDU,
        RMU,
        UNDIAL,
        WGA,
        FunctionObjective,
        GradAscent,
        GradDiff,
        IdkNLL,
        Objective,
        SatImp,
        SimNPO,
        get_objective,
        register_objective,
    )

__version__ = version("efface")

__all__ = [
    "CEU",
    "DPO",
    "NPO",
    "PDU",
    "RMU",
    "UNDIAL",
    "WGA",
    "EvaluateCallback",
    "FinetuneTrainer",
    "FunctionObjective",
    "GradAscent",
    "GradDiff",
    "IdkNLL",
    "KeepBest",
    "Objective",
    "SatImp",
    "SimNPO",
    "StopUnder",
    "UnlearnArguments",
    "UnlearnTrainer",
    "__version__",
    "evaluate",
    "functional",
    "get_objective",
    "objectives",
    "register_objective",
]

_MODULES = ("evaluate", "functional", "objectives")
# Modules that define the public names; names not listed here are defined in efface.objectives.
_PLACES = {
    "EvaluateCallback": "efface.hf.train.callbacks",
    "KeepBest": "efface.hf.train.callbacks",
    "StopUnder": "efface.hf.train.callbacks",
    "UnlearnTrainer": "efface.hf.train.trainer",
    "FinetuneTrainer": "efface.hf.train.trainer",
    "UnlearnArguments": "efface.hf.train.arguments",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"efface.{name}")
    if name in __all__:
        return getattr(importlib.import_module(_PLACES.get(name, "efface.objectives")), name)
    raise AttributeError(f"module 'efface' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
