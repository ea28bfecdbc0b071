"""The demo's story: teach two small models, make one forget, and measure it against the one that never knew."""

import copy
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from efface.cli.demo.data import DemoData, Rows
from efface.cli.demo.tokenizer import train_tokenizer
from efface.evaluate import EvalLog, SplitLog, forget_quality, score_rows
from efface.hf.arguments import UnlearnArguments
from efface.hf.trainer import FinetuneTrainer, PackedTrainer, UnlearnTrainer
from efface.objectives import NPO, GradDiff, Objective, SimNPO

TEMPLATE = "question-answer"


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo. The learning rates suit models of a few million parameters trained from scratch."""

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
    retain_rows: int = 64  # scored after every epoch
    seed: int = 0
    objectives: tuple[Objective, ...] = (
        NPO(beta=0.1, alpha=2.0),
        SimNPO(beta=1.0, gamma=2.0),
        GradDiff(),
    )


SCALES = {
    "default": Settings(),
    "smoke": replace(
        Settings(), hidden=64, layers=2, heads=2, teach_lr=4e-3, unlearn_epochs=5, unlearn_lr=2e-3, retain_rows=16
    ),
}


@dataclass
class Measured:
    """One model's row of the table, and its curve over the unlearning steps."""

    name: str
    forget_quality: float
    truth_ratio: float  # mean min(R, 1/R) on forget; 1 is best forgotten
    probability_forget: float
    probability_retain: float
    seconds: float = 0.0  # in optimizer steps
    tokens_per_second: float = 0.0
    note: str = ""  # why its training ended early
    curve: list[dict[str, float]] = field(default_factory=list)


class Examiner:
    """Scores models on the forget rows and some retain rows, against the log of the retain model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DemoData, retain_rows: int) -> None:
        self._tokenizer = tokenizer
        self._forget = data.forget
        self._retain: Rows = data.retain[:: max(1, len(data.retain) // retain_rows)][:retain_rows]
        self.retain_log: EvalLog | None = None

    def log(self, model: PreTrainedModel, source: str) -> EvalLog:
        """Score a model."""
        return EvalLog(
            {
                "forget": score_rows(model, self._tokenizer, self._forget, template=TEMPLATE),
                "retain": score_rows(model, self._tokenizer, self._retain, template=TEMPLATE, truth_ratio=False),
            },
            source=source,
        )

    def measure(self, model: PreTrainedModel, name: str) -> Measured:
        """Score a model and compare it with the retain model."""
        if self.retain_log is None:
            raise RuntimeError("the retain model must be scored first")
        log = self.log(model, name)
        try:
            ratio = log.rows("forget", "truth_ratio")
        except ValueError:  # gradient difference may drive likelihoods out of range: shown, not hidden
            ratio = np.full(len(self._forget), np.nan)
            log = EvalLog({**log.splits, "forget": SplitLog(log.rows("forget", "probability"), None)}, source=name)
        finite = bool(np.isfinite(ratio).all())
        with np.errstate(divide="ignore"):
            shown = np.minimum(ratio, 1 / ratio)
        return Measured(
            name=name,
            forget_quality=forget_quality(log, self.retain_log) if finite else float("nan"),
            truth_ratio=float(shown.mean()),
            probability_forget=float(log.rows("forget", "probability").mean()),
            probability_retain=float(log.rows("retain", "probability").mean()),
        )


class _Curve(TrainerCallback):
    """Measures the model after every epoch of unlearning."""

    def __init__(self, examiner: Examiner, name: str) -> None:
        self._examiner, self._name = examiner, name
        self.points: list[dict[str, float]] = []

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        measured = self._examiner.measure(kwargs["model"], self._name)
        self.points.append({"step": state.global_step, **_figures(measured)})


def _figures(measured: Measured) -> dict[str, float]:
    keep = ("forget_quality", "truth_ratio", "probability_forget", "probability_retain")
    return {name: value for name, value in asdict(measured).items() if name in keep}


class Story:
    """The steps of the demo, each a method, in the order in which ``efface demo`` calls them."""

    def __init__(self, data: DemoData, settings: Settings, out: Path, callbacks: list[TrainerCallback]) -> None:
        self._data, self._settings, self._out = data, settings, out
        self._callbacks = callbacks
        self.tokenizer = train_tokenizer(data.texts(), settings.vocabulary)
        self._examiner = Examiner(self.tokenizer, data, settings.retain_rows)

    def teach(self, rows: Rows) -> tuple[PreTrainedModel, PackedTrainer]:
        """Train a new small Llama on the rows; every call starts from the same weights."""
        s = self._settings
        set_seed(s.seed)
        config = LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=s.hidden,
            intermediate_size=s.hidden * 8 // 3 // 32 * 32,
            num_hidden_layers=s.layers,
            num_attention_heads=s.heads,
            num_key_value_heads=s.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=self.tokenizer.eos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        model = LlamaForCausalLM(config)
        trainer = FinetuneTrainer(
            model,
            self._arguments(epochs=s.teach_epochs, batch=s.teach_batch, lr=s.teach_lr, schedule="cosine"),
            data=rows,
            processing_class=self.tokenizer,
            callbacks=list(self._callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return model, trainer

    def examine_retain(self, model: PreTrainedModel) -> Measured:
        """Score the model that never saw the forget set; the others are compared with it."""
        self._examiner.retain_log = self._examiner.log(model, "retain")
        return self._examiner.measure(model, "retain")

    def examine(self, model: PreTrainedModel, name: str) -> Measured:
        """Score a model."""
        return self._examiner.measure(model, name)

    def unlearn(self, full: PreTrainedModel, objective: Objective) -> tuple[PreTrainedModel, Measured]:
        """Make a copy of the full model forget."""
        s = self._settings
        set_seed(s.seed)
        model = copy.deepcopy(full)
        before = self._examiner.measure(model, objective.name)
        curve = _Curve(self._examiner, objective.name)
        trainer = UnlearnTrainer(
            model,
            self._arguments(epochs=s.unlearn_epochs, batch=s.unlearn_batch, lr=s.unlearn_lr, schedule="linear"),
            forget=self._data.forget,
            retain=self._data.retain,
            objective=objective,
            processing_class=self.tokenizer,
            callbacks=[*self._callbacks, curve],
        )
        trainer.remove_callback(PrinterCallback)
        note = ""
        try:
            trainer.train()
        except FloatingPointError as error:  # the run stopped before the step that would have spread the NaN
            note = str(error).partition(";")[0]
        measured = timed(self._examiner.measure(model, objective.name), trainer)
        measured.note = note
        measured.curve = [{"step": 0, **_figures(before)}, *curve.points]
        return model, measured

    def save(self, model: PreTrainedModel, name: str) -> None:
        """Write a model and its tokenizer into the output folder."""
        model.save_pretrained(self._out / name)
        self.tokenizer.save_pretrained(self._out / name)

    def _arguments(self, *, epochs: int, batch: int, lr: float, schedule: str) -> UnlearnArguments:
        return UnlearnArguments(
            output_dir=str(self._out),
            num_train_epochs=epochs,
            pairs_per_step=batch,
            learning_rate=lr,
            lr_scheduler_type=schedule,
            warmup_steps=10,
            weight_decay=0.01,
            seed=self._settings.seed,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            template=TEMPLATE,
            use_cpu=not torch.cuda.is_available(),
            reference_cache="none",  # of a model that is made anew each time
        )


def timed(measured: Measured, trainer: PackedTrainer) -> Measured:
    """Return ``measured`` with the seconds and tokens that its training took."""
    meter = trainer.meter
    return replace(
        measured, seconds=meter.seconds, tokens_per_second=meter.tokens / meter.seconds if meter.seconds else 0.0
    )


def now() -> str:
    """Return the date, for the record."""
    return time.strftime("%Y-%m-%d")
