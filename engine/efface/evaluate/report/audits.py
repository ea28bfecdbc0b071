"""Leak audits, as ``efface audit`` writes them: what models still give away, by view."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_COUNTS = ("rows", "left_out")


@dataclass(frozen=True)
class AuditedModel:
    """A model of an audit.

    Attributes:
        audit: the run that the audit belongs to.
        name: of the model.
        figures: by view and name; "mean" is the mean novel recall, the others are its kin.
    """

    audit: str
    name: str
    figures: Mapping[tuple[str, str], float]


def read_audit(path: Path, run: str) -> list[AuditedModel]:
    """Return the models of an ``AUDIT.json``.

    Raises:
        OSError: a file that cannot be read.
        ValueError: a file that is none.
    """
    try:
        models = json.loads(path.read_text(encoding="utf-8"))["models"]
        return [AuditedModel(run, name, _figures(model["views"])) for name, model in models.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r}: expected an audit with models and their views, got something else "
            f"({type(error).__name__}: {error}); write it with `efface audit`"
        ) from error


def _figures(views: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    figures = {}
    for view, found in views.items():
        for name, value in found["figures"].items():
            if _is_number(value) and name not in _COUNTS:
                figures[view, name] = float(value)
        for label, values in (found["figures"].get("labels") or {}).items():
            if _is_number(values.get("mean")):
                figures[view, label] = float(values["mean"])
    return figures


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
