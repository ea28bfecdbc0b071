"""``efface demo``: teach a small model, make it forget, and measure it."""

import argparse
import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table

import efface
from efface.cli.console import open_console
from efface.cli.demo.data import DemoData, fictitious, tofu
from efface.cli.demo.plots import plot_forget_quality, plot_probability
from efface.cli.demo.run import SCALES, Measured, Settings, Story, now, timed
from efface.cli.output import check_output, written_whole
from efface.cli.progress import ProgressBar

# Two of them are forgotten, as in TOFU's forget01: with more rows the KS test tells even models trained alike apart.
_DEFAULT_AUTHORS = {"default": (24, 2), "smoke": (4, 1)}
_DEFAULT_TOFU_AUTHORS = {"default": (20, 2), "smoke": (4, 2)}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    flags = argparse.ArgumentParser(
        prog="efface demo",
        description="Trains a small Llama on fictitious authors (full) and another without some of them (retain); "
        "makes full forget those with NPO, SimNPO and GradDiff; compares with retain.",
        epilog="example: efface demo --data tofu/ --authors 20 --out demo-tofu",
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
