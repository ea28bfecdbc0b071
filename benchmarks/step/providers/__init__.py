"""A training step by everybody who is timed, one file each; each says what it computes."""

from benchmarks.step.providers.base import OBJECTIVE, Provider
from benchmarks.step.providers.cut import CutCompiled, CutCrossEntropy
from benchmarks.step.providers.eager import Eager, EagerCached, EagerFlat
from benchmarks.step.providers.liger import Liger
from benchmarks.step.providers.lora import EagerLora, EagerLoraCached, EffaceLora, EffaceLoraCached
from benchmarks.step.providers.ours import EffaceCached, EffaceLive

PROVIDERS: tuple[type[Provider], ...] = (
    Eager,
    EagerCached,
    EagerFlat,
    Liger,
    CutCrossEntropy,
    CutCompiled,
    EffaceLive,
    EffaceCached,
    EagerLora,
    EagerLoraCached,
    EffaceLora,
    EffaceLoraCached,
)

__all__ = [
    "OBJECTIVE",
    "PROVIDERS",
    "CutCompiled",
    "CutCrossEntropy",
    "Eager",
    "EagerCached",
    "EagerFlat",
    "EagerLora",
    "EagerLoraCached",
    "EffaceCached",
    "EffaceLive",
    "EffaceLora",
    "EffaceLoraCached",
    "Liger",
    "Provider",
]
