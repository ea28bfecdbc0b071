"""How a run was made: its objective and settings, as efface and open-unlearning leave them in its folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

# Of the arguments, what tells the runs of a grid apart.
_ARGUMENTS = {"learning_rate": "lr", "num_train_epochs": "epochs", "max_steps": "steps", "seed": "seed"}


def read_settings(folder: Path, evaluated: Path | None = None) -> dict[str, str]:
    """Return ``objective`` and its settings, and of what the evaluation is, as text; empty where nothing tells.

    Args:
        folder: of the run, with efface's ``run.json`` or model card, or open-unlearning's configuration.
        evaluated: folder of the evaluation; its ``EVAL_CONFIG.json`` names the model where the run's folder is another.
    """
    facts = {} if evaluated is None else _facts(evaluated)
    settings = _made(folder)
    if not settings and facts.get("model"):
        settings = _made(Path(facts["model"]))
    return settings | {name: facts[name] for name in ("split", "protocol") if name in facts}


def _made(folder: Path) -> dict[str, str]:
    for read in (_run_record, _card, _hydra):
        try:
            objective, arguments = read(folder)
            settings = {"objective": str(objective["name"])}
            settings |= {str(name): _text(value) for name, value in objective.items() if name != "name"}
            unused = "max_steps" if arguments.get("max_steps", -1) == -1 else "num_train_epochs"
            for name, short in _ARGUMENTS.items():
                if name != unused and arguments.get(name) is not None:
                    settings[short] = _text(arguments[name])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            continue  # another tool's file of that name, or none
        return settings
    return {}


def _facts(folder: Path) -> dict[str, str]:
    try:
        content = json.loads((folder / "EVAL_CONFIG.json").read_text(encoding="utf-8"))
        facts = {"model": content.get("model"), "split": content["split"], "protocol": content["protocol"]["name"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {name: value for name, value in facts.items() if isinstance(value, str)}


def _run_record(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    identity = json.loads((folder / "run.json").read_text(encoding="utf-8"))["identity"]
    return identity["objective"], {**identity["arguments"], **identity["plan"]}


def _card(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    _, header, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    recipe = yaml.safe_load(header)["efface"]
    return recipe["objective"], {**recipe["arguments"], **recipe["plan"]}


def _hydra(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    trainer = yaml.safe_load((folder / ".hydra" / "config.yaml").read_text(encoding="utf-8"))["trainer"]
    return {"name": trainer["handler"], **(trainer.get("method_args") or {})}, trainer["args"]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
