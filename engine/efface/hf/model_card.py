"""The model card: what was done to a model, for people and, in its header, for programs."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from efface.hf.recipe import Recipe

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")  # what the Hub accepts as a name in a card's header


def model_card(recipe: Recipe, log_history: list[dict[str, Any]], *, step: int) -> ModelCard:
    """Return the card of the model that ``recipe`` had made after ``step`` optimizer steps."""
    losses, evaluations = final_metrics(log_history)
    name = f"{recipe.method} of {Path(recipe.base_model).name or 'a model'}"
    data = ModelCardData(
        base_model=recipe.base_model if _is_hub_name(recipe.base_model) else None,
        datasets=sorted({source for facts in recipe.data.values() if _is_hub_name(source := facts.hub_name)}) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["efface", "machine-unlearning", recipe.method],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="forget-retain",
                dataset_name="forget and retain sets of the run",
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in evaluations.items()
        ]
        or None,
        efface={**recipe.as_dict(), "step": step, "metrics": {**losses, **evaluations}},
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(name, recipe, {**losses, **evaluations}, step)}")


def final_metrics(log_history: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the last value of each loss of a run's log, and of each evaluation result; only finite numbers."""
    losses: dict[str, float] = {}
    evaluations: dict[str, float] = {}
    for entry in log_history:
        for key, value in entry.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            if key.startswith("eval_"):
                evaluations[key] = float(value)
            elif key == "loss" or (key.endswith("_loss") and key != "train_loss"):
                losses[key] = float(value)
    return losses, evaluations


def _is_hub_name(name: str) -> bool:
    return bool(_REPOSITORY.fullmatch(name)) and not Path(name).exists()


def _body(name: str, recipe: Recipe, metrics: dict[str, float], step: int) -> str:
    command = f"## Reproduce\n\n```\n{recipe.command}\n```\n" if recipe.command else ""
    made = f"`{recipe.method}` from `{recipe.base_model}` (revision `{recipe.revision}`), {step} optimizer steps"
    data = [
        (role, f"`{facts.source}`", facts.counts(), f"`{facts.fingerprint}`", ", ".join(facts.filters) or "-")
        for role, facts in recipe.data.items()
    ]
    sections = [
        f"# {name}",
        f"Made with efface {recipe.versions['efface']}: {made}.",
        f"Adapter: {recipe.adapter}." if recipe.adapter else "",
        "## Objective\n\n" + _table(("parameter", "value"), _rows(recipe.objective)),
        "## Data\n\n" + _table(("set", "source", "rows", "fingerprint of the tokens", "filter"), data),
        "## Hyperparameters\n\n" + _table(("name", "value"), _rows({**recipe.plan, **recipe.arguments})),
        "## Metrics\n\n" + _table(("name", "last value"), [(key, f"{value:.6g}") for key, value in metrics.items()]),
        "## Versions\n\n" + _table(("package", "version"), _rows(recipe.versions)),
        command,
    ]
    return "\n\n".join(filter(None, sections)).rstrip() + "\n"


def _rows(values: dict[str, Any]) -> list[tuple[str, ...]]:
    return [(f"`{key}`", f"`{value}`") for key, value in values.items()]


def _table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heading, tuple("---" for _ in heading), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )
