"""The demo's two plots: forget quality, and probability on forget and retain rows, over the steps of unlearning."""

import argparse
import copy
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
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

import efface
from efface.cli.progress import ProgressBar, open_console
from efface.evaluate import EvalLog, SplitLog, forget_quality, score_rows
from efface.files import check_output, written_whole
from efface.flags import FlagParser
from efface.hf.train.arguments import UnlearnArguments
from efface.hf.train.trainer import FinetuneTrainer, PackedTrainer, UnlearnTrainer
from efface.objectives import NPO, GradDiff, Objective, SimNPO
from efface.simulate.data import DemoData, Rows, fictitious, tofu
from efface.simulate.teach import train_tokenizer

mpl.use("Agg")


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


def plot_forget_quality(unlearned: Sequence[Measured], path: Path) -> None:
    """Write forget quality over steps, on a logarithmic axis."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for measured in unlearned:
        steps = [point["step"] for point in measured.curve]
        axes.plot(steps, [point["forget_quality"] for point in measured.curve], marker="o", label=measured.name)
    axes.axhline(0.05, color="grey", linestyle="--", linewidth=1)
    axes.annotate("p = 0.05", (0, 0.05), textcoords="offset points", xytext=(0, 4), color="grey", fontsize=8)
    axes.set(xlabel="optimizer step", ylabel="forget quality (KS p-value)", yscale="log")
    axes.set_title("Can it be told from a model that never knew?")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_probability(unlearned: Sequence[Measured], path: Path) -> None:
    """Write the answers' probability on forget (solid) and retain (dashed) rows over steps."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for index, measured in enumerate(unlearned):
        steps = [point["step"] for point in measured.curve]
        for role, style in (("forget", "-"), ("retain", "--")):
            values = [point[f"probability_{role}"] for point in measured.curve]
            axes.plot(steps, values, style, color=f"C{index}", marker=".", label=f"{measured.name}, {role}")
    axes.set(xlabel="optimizer step", ylabel="probability of the answer", ylim=(-0.02, 1.02))
    axes.set_title("What it forgets, and what it keeps")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# Two of them are forgotten, as in TOFU's forget01: with more rows the KS test tells even models trained alike apart.
_DEFAULT_AUTHORS = {"default": (24, 2), "smoke": (4, 1)}
_DEFAULT_TOFU_AUTHORS = {"default": (20, 2), "smoke": (4, 2)}


def parser() -> FlagParser:
    """Return the parser of the command's flags."""
    flags = FlagParser(
        "demo",
        "Trains a small Llama on fictitious authors (full) and another without some of them (retain); "
        "makes full forget those with NPO, SimNPO and GradDiff; compares with retain.",
        "example: efface demo --data tofu/ --authors 20 --out demo-tofu",
    )
    flags.add_argument("--out", type=Path, default=Path("demo-out"), help="output folder (default: demo-out)")
    flags.add_argument("--data", type=Path, help="folder with TOFU's JSON files; default: made-up authors")
    flags.add_argument("--authors", type=int, help="how many authors in all (default: 24; TOFU: 20)")
    flags.add_argument("--forget-authors", type=int, help="how many of them to forget (default: 2; smoke: 1)")
    flags.add_argument("--scale", choices=sorted(SCALES), default="default", help="smoke ends within a minute")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--overwrite", action="store_true", help="write into an output folder that is not empty")
    return flags


def _data(options: argparse.Namespace) -> DemoData:
    defaults = (_DEFAULT_AUTHORS if options.data is None else _DEFAULT_TOFU_AUTHORS)[options.scale]
    authors = defaults[0] if options.authors is None else options.authors
    forget = defaults[1] if options.forget_authors is None else options.forget_authors
    return fictitious(authors, forget) if options.data is None else tofu(options.data, authors, forget)


def _settings(options: argparse.Namespace) -> Settings:
    settings = replace(SCALES[options.scale], seed=options.seed)
    # TOFU's texts are longer and more varied: a larger vocabulary, and fewer passes over more tokens.
    if options.data is not None and options.scale == "default":
        settings = replace(settings, vocabulary=4096, teach_epochs=30)
    return settings


def results_table(results: Sequence[Measured], title: str) -> Table:
    """Return the table that the demo prints."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("model", no_wrap=True)
    for name in ("forget quality", "truth ratio", "P(forget)", "P(retain)", "seconds", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in results:
        table.add_row(
            row.name,
            f"{row.forget_quality:.2g}",
            f"{row.truth_ratio:.3f}",
            f"{row.probability_forget:.3g}",
            f"{row.probability_retain:.3f}",
            f"{row.seconds:.1f}",
            f"{row.tokens_per_second:,.0f}",
        )
    return table


def _machine() -> dict[str, Any]:
    return {
        "date": now(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "efface": efface.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def tell(data: DemoData, settings: Settings, out: Path, console: Console) -> list[Measured]:
    """Run the story, write models, plots and figures into ``out``, and return the table's rows."""
    bar = ProgressBar(console, "", log=False)
    story = Story(data, settings, out, [bar])
    try:
        bar.title = f"teaching the retain model ({len(data.retain)} rows)"
        retain, trainer = story.teach(data.retain)
        results = [timed(story.examine_retain(retain), trainer)]
        bar.title = f"teaching the full model ({len(data.full)} rows)"
        full, trainer = story.teach(data.full)
        results.insert(0, timed(story.examine(full, "full"), trainer))
        story.save(retain, "retain")
        story.save(full, "full")
        unlearned = []
        for objective in settings.objectives:
            bar.title = f"forgetting {len(data.forget)} rows with {type(objective).__name__}"
            model, measured = story.unlearn(full, objective)
            story.save(model, objective.name)
            unlearned.append(measured)
    finally:
        bar.close()
    plot_forget_quality(unlearned, out / "forget_quality.png")
    plot_probability(unlearned, out / "probability.png")
    results += unlearned
    record = {
        "data": data.name,
        "settings": asdict(settings),
        "machine": _machine(),
        "results": [asdict(row) for row in results],
    }
    # NaN, which a collapsed model may produce, is not JSON
    (out / "demo.json").write_text(json.dumps(_json_safe(record), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return results


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json_safe(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parser().parse_args(argv)
    out = check_output(options.out, overwrite=options.overwrite)
    data = _data(options)
    # the demo tells its own story; the libraries' progress lines would cut through its bars
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = open_console()
    with written_whole(out) as partial:
        results = tell(data, _settings(options), partial, console)
    console.print(results_table(results, data.name))
    for row in results:
        if row.note:
            console.print(f"{row.name}: {row.note}")
    console.print(f"models, plots and figures: {out}")
    return 0
