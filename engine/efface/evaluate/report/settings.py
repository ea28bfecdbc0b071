"""How a run was made: its objective and settings, as efface and open-unlearning leave them in its folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

# Of the arguments, what tells the runs of a grid apart.
_ARGUMENTS = {"learning_rate": "lr", "num_train_epochs": "epochs", "max_steps": "steps", "seed": "seed"}


def read_settings(folder: Path) -> dict[str, str]:
    """Return ``objective`` and its settings as text; empty where nothing in the folder tells.

    Read are efface's ``run.json`` and model card, and the configuration that open-unlearning keeps of a run.
    """
    for read in (_run_record, _card, _hydra):
        try:
            objective, arguments = read(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            continue  # another tool's file of that name, or none
        settings = {"objective": str(objective["name"])}
        settings |= {str(name): _text(value) for name, value in objective.items() if name != "name"}
        unused = "max_steps" if arguments.get("max_steps", -1) == -1 else "num_train_epochs"
        for name, short in _ARGUMENTS.items():
            if name != unused and arguments.get(name) is not None:
                settings[short] = _text(arguments[name])
        return settings
    return {}


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
