"""Run folders as tools leave them, with made-up rows, for the tests of the report."""

import json
from pathlib import Path
from typing import Any

import numpy as np

PARTS = {"retain": "Q_A_Prob", "ra": "Q_A_Prob_normalised", "wf": "Q_A_Prob_normalised", "forget": "Q_A_Prob"}


def evaluation(seed: int, *, shift: float = 0.0, rows: int = 20, text: str = "it is {}") -> dict[str, Any]:
    """TOFU_EVAL.json of a model whose truth ratios on the forget rows lie around exp(shift)."""
    draw = np.random.default_rng(seed)
    content: dict[str, Any] = {}
    for prefix, probability in PARTS.items():
        around = shift if prefix == "forget" else -1.0
        ratios = np.exp(draw.normal(around, 0.5, rows)).tolist()
        columns = {
            f"{prefix}_{probability}": ("prob", draw.uniform(0.3, 1, rows).tolist()),
            f"{prefix}_Q_A_ROUGE": ("rougeL_recall", draw.uniform(0.1, 1, rows).tolist()),
            "forget_truth_ratio" if prefix == "forget" else f"{prefix}_Truth_Ratio": ("score", ratios),
        }
        for name, (field, values) in columns.items():
            content[name] = {
                "agg_value": float(np.mean(values)),
                "value_by_index": {str(i): {field: value} for i, value in enumerate(values)},
            }
        for i, row in content[f"{prefix}_Q_A_ROUGE"]["value_by_index"].items():
            row |= {"input": f"what is {i}?", "ground_truth": f"it is {i}", "generation": ""}
            row["generation"] = text.format(i) if prefix == "forget" else f"it is {i}"
    content["extraction_strength"] = {"agg_value": 0.125}
    return content


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_evaluation(folder: Path, content: dict[str, Any]) -> Path:
    summary = {name: metric["agg_value"] for name, metric in content.items()}
    write(folder / "TOFU_SUMMARY.json", summary)
    return write(folder / "TOFU_EVAL.json", content)


def write_run(
    folder: Path, seed: int, *, lr: float = 1e-5, checkpoints: int = 2, rows: int = 20, **options: Any
) -> Path:
    """A folder of ``efface unlearn``, its checkpoints evaluated, and what was logged while it ran."""
    identity = {
        "objective": {"name": "npo", "beta": 0.1, "alpha": 1.0},
        "arguments": {"learning_rate": lr, "num_train_epochs": 5.0, "max_steps": -1},
        "plan": {"seed": seed},
    }
    write(folder / "run.json", {"finished": True, "identity": identity})
    history = [{"step": step, "epoch": step / 10, "loss": 1 / step, "forget_loss": 2 / step} for step in (10, 20, 30)]
    write(folder / "trainer_state.json", {"global_step": 30, "log_history": history})
    for step in range(1, checkpoints + 1):
        content = evaluation(100 * seed + step, shift=-1.0 + step / 3, rows=rows, **options)
        write_evaluation(folder / f"checkpoint-{10 * step}" / "evals", content)
    write_evaluation(folder / "evals", evaluation(seed, rows=rows, **options))
    return folder


def write_audit(path: Path) -> Path:
    def view(mean: float) -> dict[str, Any]:
        figures = {
            "rows": 20,
            "left_out": 0,
            "mean": mean,
            "best": mean,
            "leaked": None,
            "labels": {"de": {"mean": mean}},
        }
        return {"figures": figures, "records": []}

    models = {name: {"path": name, "views": {"direct": view(mean)}} for name, mean in (("full", 0.75), ("npo", 0.25))}
    return write(path, {"rows": 20, "models": models})
