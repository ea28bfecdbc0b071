"""efface: fast, exact unlearning for Hugging Face causal language models.

The loss backend is ``efface.functional``; the objectives are below; the run is ``efface.UnlearnTrainer``. Importing
this package initialises no device and imports no trainer: those names are loaded when they are first used.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from efface import functional
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

if TYPE_CHECKING:
    from efface import evaluate
    from efface.hf.train.arguments import UnlearnArguments
    from efface.hf.train.callbacks import EvaluateCallback, KeepBest, StopUnder
    from efface.hf.train.trainer import FinetuneTrainer, UnlearnTrainer

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
    "register_objective",
]

_LAZY = {
    "EvaluateCallback": "efface.hf.train.callbacks",
    "KeepBest": "efface.hf.train.callbacks",
    "StopUnder": "efface.hf.train.callbacks",
    "UnlearnTrainer": "efface.hf.train.trainer",
    "FinetuneTrainer": "efface.hf.train.trainer",
    "UnlearnArguments": "efface.hf.train.arguments",
}


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        return importlib.import_module("efface.evaluate")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'efface' has no attribute {name!r}")
