"""The run of the demo: train a small plain Llama, unlearn with several objectives, and evaluate after every epoch."""

import contextlib
import importlib.metadata
import math
import platform
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from efface.evaluate import EvalLog, forget_quality, score_rows
from efface.hf.model.loading import load_model
from efface.hf.train.arguments import UnlearnArguments
from efface.hf.train.trainer import PackedTrainer, UnlearnTrainer
from efface.objectives import NPO, GradDiff, Objective, SimNPO
from efface.simulate.data import Rows, SimulatedData
from efface.simulate.run import Progress, SimulatedModel, Simulation
from efface.simulate.teach import PLAIN, Size, model_of, quiet_arguments, teach, train_tokenizer


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and learning rates of the demo, chosen for models of a few million parameters trained from scratch."""

    vocabulary: int = 2048
    hidden: int = 192
    layers: int = 4
    heads: int = 4
    teach_epochs: int = 40
    teach_batch: int = 16
    teach_lr: float = 2e-3
    unlearn_epochs: int = 10
    unlearn_batch: int = 4
    unlearn_lr: float = 6e-4
    retain_rows: int = 64  # retain rows that are scored after every epoch
    seed: int = 0
    objectives: tuple[Objective, ...] = (NPO(beta=0.1, alpha=2.0), SimNPO(beta=1.0, gamma=2.0), GradDiff())


DEMO_SETTINGS = {
    "default": DemoSettings(),
    "smoke": DemoSettings(
        hidden=64, layers=2, heads=2, teach_lr=4e-3, unlearn_epochs=5, unlearn_lr=2e-3, retain_rows=16
    ),
}


class Demo(Simulation):
    """The run of the demo. It writes each model into a folder of its name.

    Attributes:
        curves: name of an objective -> figures before unlearning and after each epoch, each with its ``step``.
    """

    def __init__(self, data: SimulatedData, settings: DemoSettings, out: Path, progress: Progress) -> None:
        super().__init__(data, out, progress)
        self._settings = settings
        self._objectives = {objective.name: objective for objective in settings.objectives}
        self._tokenizer = train_tokenizer(data.texts(), settings.vocabulary)
        every = max(1, len(data.retain) // settings.retain_rows)
        self._asked: Rows = data.retain[::every][: settings.retain_rows]
        self.curves: dict[str, list[dict[str, float]]] = {}

    def tell(self) -> list[SimulatedModel]:
        """Run the demo. Return the models in the order of the table: full, retain, then the unlearned models."""
        retain, full, *unlearned = self.run([*self._objectives])
        return [full, retain, *unlearned]

    def teach(self, name: str, rows: Rows) -> SimulatedModel:
        """Train a new Llama on the rows. Every call starts from the same initial weights."""
        s, bar = self._settings, self.progress(f"training the {name} model ({len(rows)} rows)")
        size = Size(s.hidden, s.layers, s.heads, s.vocabulary)
        model = model_of(PLAIN, self._tokenizer, size, seed=s.seed)
        args = self._arguments(s.teach_epochs, s.teach_batch, s.teach_lr, "cosine")
        trainer = teach(model, self._tokenizer, rows, args, self.out / name, [bar])
        return SimulatedModel(name, str(self.out / name), _timed(trainer))

    def forget(self, full: SimulatedModel, way: str) -> SimulatedModel:
        """Unlearn from a copy of the full model with an objective, and record its figures after every epoch."""
        s, objective = self._settings, self._objectives[way]
        bar = self.progress(f"unlearning {len(self.data.forget)} rows with {type(objective).__name__}")
        model = self._load(full.folder)
        self.curves[way] = [{"step": 0, **self.figures(model, way)}]
        set_seed(s.seed)
        trainer = UnlearnTrainer(
            model,
            self._arguments(s.unlearn_epochs, s.unlearn_batch, s.unlearn_lr, "linear"),
            forget=self.data.forget,
            retain=self.data.retain,
            objective=objective,
            processing_class=self._tokenizer,
            callbacks=[bar, _Curve(self, way)],
        )
        trainer.remove_callback(PrinterCallback)
        note = ""
        try:
            trainer.train()
        except FloatingPointError as error:  # the trainer stops before a step that would write NaN into the weights
            note = str(error).partition(";")[0]
        model.save_pretrained(self.out / way)
        self._tokenizer.save_pretrained(self.out / way)
        return SimulatedModel(way, str(self.out / way), _timed(trainer), note)

    def examine(self, model: SimulatedModel) -> SimulatedModel:
        """Return the model with the figures of its answers to the forget rows and some retain rows."""
        return replace(model, figures={**self.figures(self._load(model.folder), model.name), **model.figures})

    def figures(self, model: PreTrainedModel, name: str) -> dict[str, float]:
        """Score a model and compare it with the retain model.

        ``truth_ratio`` is the mean of min(R, 1/R) over the forget rows, at best 1. ``truth_ratio`` and
        ``forget_quality`` are NaN if a truth ratio cannot be computed.
        """
        log = self._log(model, name)
        quality = truth_ratio = float("nan")
        # Gradient difference can drive likelihoods out of range. Report the figures anyway, as 0 or NaN.
        with contextlib.suppress(ValueError), np.errstate(divide="ignore"):
            ratio = log.rows("forget", "truth_ratio")
            truth_ratio = float(np.minimum(ratio, 1 / ratio).mean())
        if not math.isnan(truth_ratio):
            quality = forget_quality(log, self._retain_log)
        probability = {split: float(log.rows(split, "probability").mean()) for split in ("forget", "retain")}
        return {
            "forget_quality": quality,
            "truth_ratio": truth_ratio,
            "probability_forget": probability["forget"],
            "probability_retain": probability["retain"],
        }

    @cached_property
    def _retain_log(self) -> EvalLog:
        return self._log(self._load(self.out / "retain"), "retain")

    def _log(self, model: PreTrainedModel, name: str) -> EvalLog:
        ask = partial(score_rows, model, self._tokenizer, template=PLAIN.template)
        splits = {"forget": ask(self.data.forget), "retain": ask(self._asked, truth_ratio=False)}
        return EvalLog(splits, source=name)

    def _load(self, folder: str | Path) -> PreTrainedModel:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: PreTrainedModel = load_model(str(folder), dtype="float32").to(device)
        return model

    def _arguments(self, epochs: int, batch: int, rate: float, schedule: str) -> UnlearnArguments:
        return quiet_arguments(
            self.out,
            PLAIN.template,
            num_train_epochs=epochs,
            pairs_per_step=batch,
            learning_rate=rate,
            lr_scheduler_type=schedule,
            seed=self._settings.seed,
            use_cpu=not torch.cuda.is_available(),
            reference_cache="none",  # useless for a model that is trained again in each run
        )

    def record(self, models: list[SimulatedModel]) -> dict[str, Any]:
        """Return the content of ``demo.json``: data, settings, machine and results."""
        machine = {
            "date": time.strftime("%Y-%m-%d"),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "efface": importlib.metadata.version("efface"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        results = [{"name": m.name, **m.figures, "note": m.note, "curve": self.curves.get(m.name, [])} for m in models]
        return {"data": self.data.name, "settings": asdict(self._settings), "machine": machine, "results": results}


class _Curve(TrainerCallback):
    """A trainer callback that records the figures of the model after every epoch."""

    def __init__(self, demo: Demo, way: str) -> None:
        self._demo, self._way = demo, way

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        figures = self._demo.figures(kwargs["model"], self._way)
        self._demo.curves[self._way].append({"step": state.global_step, **figures})


def _timed(trainer: PackedTrainer) -> dict[str, float]:
    """Return the seconds that the optimizer steps took, and their tokens per second."""
    seconds, tokens = trainer.meter.seconds, trainer.meter.tokens
    return {"seconds": seconds, "tokens_per_second": tokens / seconds if seconds else 0.0}
