"""Support for Hugging Face models, in four subpackages: ``text``, ``model``, ``reference`` and ``train``."""

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

# Old module name -> current one. The old names were documented, or are pickled in training_args.bin of earlier runs.
_MOVED = {
    "adapters": "model.lora",
    "arguments": "train.arguments",
    "callbacks": "train.callbacks",
    "checkpoints": "train.checkpoints",
    "data": "text.data",
    "fingerprint": "model.fingerprint",
    "head": "model.head",
    "loading": "model.loading",
    "open_unlearning": "train.open_unlearning",
    "templates": "text.templates",
    "token_cache": "text.token_cache",
    "trainer": "train.trainer",
}


class _MovedModule(ModuleType):
    """A deprecated alias of a moved module; the new module is imported on the first attribute access."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        new = f"{__name__}.{_MOVED[self.__name__.rpartition('.')[2]]}"
        warnings.warn(f"{self.__name__} has moved to {new}; import it from there", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(new), name)


sys.modules.update({f"{__name__}.{old}": _MovedModule(f"{__name__}.{old}") for old in _MOVED})
