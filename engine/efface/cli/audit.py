"""``efface audit``: measure what unlearned models still reveal, next to the full and the retain model."""

import argparse
import gc
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from efface.cli.progress import Bar, add_json_flag, open_console, show_json
from efface.evaluate.audit import VIEWS, AuditResult, BestOf, Clues, Relearn, View, audit
from efface.evaluate.audit.result import AROUND, Document, cells
from efface.evaluate.audit.rows import TOFU_GROUP, audit_rows
from efface.evaluate.audit.views import get_view
from efface.evaluate.logs import read_json
from efface.files import check_output, in_words, locked_folder, remove_leftovers, written_whole
from efface.flags import FlagParser, positive
from efface.hf.model.loading import MAIN, load_model, load_tokenizer
from efface.hf.text.rows import Rows, load_rows
from efface.hf.text.templates import AUTO
from efface.processes import processes

JSON_NAME, MARKDOWN_NAME, STORE_NAME = "AUDIT.json", "AUDIT.md", "audit_rows.sqlite"

_EXAMPLES = """
examples:
  efface audit --model ./npo --full ./full --retain ./retain90 --data tofu/ \\
      --output audit-npo
  efface audit --model ./npo ./simnpo --data rows.json --views direct,cloze,choice \\
      --output audit

The figures are means of novel recall over rows. Novel recall is the share of the
answer's content words, without those of the prompt, that the model generates. `kept` is
(model - retain) / (full - retain). Run a stopped command again to continue it.
"""


def parser() -> FlagParser:
    """Return the parser of the command's flags."""
    flags = FlagParser(
        "audit",
        "Asks models for the content of the forget set in several ways, and measures how much they reveal.",
        _EXAMPLES,
    )
    flags.add_argument("--model", nargs="+", required=True, help="unlearned checkpoints: folders or Hub names")
    flags.add_argument("--full", help="model before unlearning")
    flags.add_argument("--retain", help="model trained without the forget set")
    flags.add_argument("--revision", default=MAIN, help="revision of --model")
    flags.add_argument("--tokenizer", help="folder or Hub name (default: the tokenizer of each model)")
    flags.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a checkpoint")
    flags.add_argument("--data", required=True, help="file of rows, folder with TOFU's files, or Hub data set")
    flags.add_argument("--split", help="split in a folder or a Hub data set: forget01, forget05 or forget10 (default)")
    flags.add_argument(
        "--views", default=",".join(VIEWS), help=f"comma-separated, one or more of {', '.join(VIEWS)} (default: all)"
    )
    flags.add_argument(
        "--group-column", help="column that names the subject of a row (default: groups of --group-size rows)"
    )
    flags.add_argument("--group-size", type=int, default=TOFU_GROUP, help="rows of one author (default: 20)")
    flags.add_argument("--samples", type=int, default=BestOf.samples, help="best-of-n: samples per prompt (default: 8)")
    flags.add_argument(
        "--temperature", type=float, default=BestOf.temperature, help="best-of-n: sampling temperature (default: 1)"
    )
    flags.add_argument(
        "--top-p", type=float, default=BestOf.top_p, help="best-of-n: nucleus sampling (default: 1, all tokens)"
    )
    flags.add_argument(
        "--clues",
        type=int,
        nargs="+",
        default=Clues.clues,
        help="clues: numbers of earlier rows of the author in the prompt (default: 1 3 5)",
    )
    flags.add_argument(
        "--relearn-share",
        type=float,
        default=Relearn.share,
        help="relearn: share of the rows to train on (default: 0.1)",
    )
    flags.add_argument(
        "--relearn-steps", type=int, default=Relearn.steps, help="relearn: optimizer steps (default: 20)"
    )
    flags.add_argument(
        "--relearn-lr", type=float, default=Relearn.learning_rate, help="relearn: learning rate (default: 2e-5)"
    )
    flags.add_argument("--relearn-lora-r", type=int, help="relearn: train a LoRA adapter of this rank (needs peft)")
    flags.add_argument("--seed", type=int, default=0, help="seed of sampling and relearning (default: 0)")
    flags.add_argument("--template", default=AUTO, help="prompt format, as for efface unlearn")
    flags.add_argument("--max-new-tokens", type=int, default=200, help="most tokens of a generation (default: 200)")
    flags.add_argument(
        "--token-budget", type=positive, default=8192, help="maximum tokens per forward pass (default: 8192)"
    )
    flags.add_argument("--dtype", default="auto", help="dtype to load models in: auto, float32, bfloat16, float16")
    flags.add_argument("--output", type=Path, required=True, help="folder for AUDIT.json and AUDIT.md")
    flags.add_argument("--overwrite", action="store_true", help="replace an existing audit")
    add_json_flag(flags)
    return flags


def audit_data(data: str, split: str | None) -> Rows:
    """Return the rows of ``data``, with perturbed answers if the folder or the data set has them.

    Args:
        data: a file of rows, a folder with one file for each split, or a Hub data set.
        split: forget01, forget05 or forget10. None means forget10 for a folder or a plain Hub name,
            and all rows otherwise.

    Raises:
        FileNotFoundError: the file does not exist, or the folder has no file of the split.
        ValueError: ``data`` names a file or a configuration of another split.
    """
    folder = Path(data).expanduser()
    if folder.is_file() or folder.suffix in (".json", ".jsonl", ".csv", ".parquet"):
        if split is not None and split not in folder.name:
            raise ValueError(
                f"--split {split}: expected a folder or a file of that split, got {data!r}; drop --split, or name "
                "the folder"
            )
        return load_rows(folder)
    if ":" in data and not folder.is_dir():
        if split is not None and split not in data:
            raise ValueError(
                f"--split {split}: expected a data set of that split, got {data!r}; drop --split, or name the data "
                "set only"
            )
        return load_rows(data)
    split = split or "forget10"
    if not folder.is_dir():
        return load_rows(f"{data}:{split}_perturbed")
    for name in (f"{split}_perturbed.json", f"{split}.json"):
        if (folder / name).is_file():
            return load_rows(folder / name)
    splits = sorted(path.stem.removesuffix("_perturbed") for path in folder.glob("forget*.json"))
    known = ", ".join(dict.fromkeys(splits)) or "none"
    raise FileNotFoundError(f"--split {split}: expected {split}_perturbed.json in {data!r}, got splits {known}")


def chosen_views(options: argparse.Namespace) -> list[View]:
    """Return the views of ``--views`` with the settings of their flags.

    Raises:
        ValueError: an unknown view, or a setting out of its range.
    """
    settings: dict[str, dict[str, Any]] = {
        BestOf.name: {
            "samples": options.samples,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": options.seed,
        },
        Clues.name: {"clues": tuple(options.clues)},
        Relearn.name: {
            "share": options.relearn_share,
            "steps": options.relearn_steps,
            "learning_rate": options.relearn_lr,
            "lora_r": options.relearn_lora_r,
            "seed": options.seed,
        },
    }
    names = [name.strip() for name in options.views.split(",") if name.strip()]
    return [type(get_view(name))(**settings.get(name, {})) for name in names]


def model_names(options: argparse.Namespace) -> dict[str, str]:
    """Return the models by the names in the table, in its order: full, the unlearned models, retain.

    The name of an unlearned model is that of its folder, or its whole path if names would clash.

    Raises:
        ValueError: a model is given twice.
    """
    unlearned = list(options.model)
    if len({Path(place).name for place in unlearned} | set(AROUND)) == len(unlearned) + len(AROUND):
        named = {Path(place).name: place for place in unlearned}
    else:
        named = {place: place for place in unlearned}
    if len(named) != len(unlearned):
        raise ValueError(f"--model: expected each model once, got {' '.join(unlearned)}")
    full, retain = ({name: place} if (place := getattr(options, name)) else {} for name in AROUND)
    return {**full, **named, **retain}


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    state = processes()
    console = open_console(stderr=True, quiet=not state.is_main_process)
    output: Path = check_output(
        options.output,
        overwrite=True,
        inputs={"--data": options.data},
        replaced=(JSON_NAME, MARKDOWN_NAME, STORE_NAME),
    )
    models = model_names(options)
    if (output / JSON_NAME).exists() and not options.overwrite:
        raise FileExistsError(
            f"{str(output / JSON_NAME)!r}, an audit of {_audited_models(output / JSON_NAME)} (this one is of "
            f"{', '.join(models.values())}), exists; choose another --output, or add --overwrite"
        )
    views, rows = chosen_views(options), audit_data(options.data, options.split)
    read = audit_rows(rows, group_column=options.group_column, group_size=options.group_size)
    for view in views:  # raises for invalid rows before a model is loaded
        view.probes(read)
    # Load the tokenizers first: an unknown model name raises before anything is computed.
    tokenizers = {
        name: load_tokenizer(
            options.tokenizer or place,
            revision=MAIN if options.tokenizer else _revision(name, options),
            trust_remote_code=options.trust_remote_code,
        )
        for name, place in models.items()
    }
    with locked_folder(output) if state.is_main_process else nullcontext():
        if state.is_main_process:
            remove_leftovers(output)
        if there := [path for name in (JSON_NAME, MARKDOWN_NAME) if (path := output / name).exists()]:
            console.print(f"will be replaced when the audit is complete: {in_words(there)}")
        return _audit(options, output, models, tokenizers, rows, views, console)


def _audit(
    options: argparse.Namespace,
    output: Path,
    models: Mapping[str, str],
    tokenizers: Mapping[str, Any],
    rows: Rows,
    views: Sequence[View],
    console: Console,
) -> int:
    """Audit the models, then write and print the result."""
    state = processes()
    audits = {
        name: _audited(name, place, tokenizers[name], rows, views, options, console) for name, place in models.items()
    }
    found = Document(
        source=options.data if options.split is None else f"{options.data}, {options.split}",
        models=models,
        audits=audits,
        settings={
            name: getattr(options, name) for name in ("template", "max_new_tokens", "group_column", "group_size")
        },
    )
    with written_whole(output, writes=state.is_main_process) as partial:
        if state.is_main_process:
            (partial / JSON_NAME).write_text(found.json_text(), encoding="utf-8")
            (partial / MARKDOWN_NAME).write_text(found.markdown_text(), encoding="utf-8")
    if state.is_main_process:
        if options.json:
            show_json(_figures(found, output / JSON_NAME))
        else:
            open_console().print(_table(audits, len(rows)))
    console.print(f"prompts, generations and scores: {output / JSON_NAME}")
    return 0


def _figures(found: Document, path: Path) -> dict[str, Any]:
    """Return the figures of every view, and the path of the file with the records."""
    models = {
        name: {view: dict(seen.figures) for view, seen in audited.views.items()}
        for name, audited in found.audits.items()
    }
    return {"data": found.source, "models": models, "records": path}


def _table(audits: Mapping[str, AuditResult], rows: int) -> Table:
    headings, lines = cells(audits)
    table = Table(title=f"novel recall, {rows} rows", box=box.SIMPLE_HEAD, padding=(0, 1))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    for line in lines:
        table.add_row(*line)
    return table


def _audited_models(path: Path) -> str:
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        return ", ".join(str(model["path"]) for model in read_json(path, "audit")["models"].values())
    return "unknown models"


def _revision(name: str, options: argparse.Namespace) -> str:
    return MAIN if name in AROUND else str(options.revision)


def _audited(
    name: str,
    place: str,
    tokenizer: Any,
    rows: Rows,
    views: Sequence[View],
    options: argparse.Namespace,
    console: Console,
) -> AuditResult:
    """Load a model, audit it, and free its memory."""
    with closing(Bar(console, name)) as bar:
        bar.stage("loading the model")
        model = load_model(
            place,
            revision=_revision(name, options),
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
        ).to(processes().device)
        result = audit(
            model,
            tokenizer,
            rows,
            views=views,
            group_column=options.group_column,
            group_size=options.group_size,
            template=options.template,
            max_new_tokens=options.max_new_tokens,
            token_budget=options.token_budget,
            store=options.output / STORE_NAME,
            progress=bar.follow,
        )
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result
