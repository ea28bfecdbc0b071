"""``efface evaluate``: run TOFU's evaluation, FAME's evaluation, or other metrics on any rows."""

import argparse
import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from efface.cli.progress import Bar, add_json_flag, open_console, show_json
from efface.evaluate import EvalLog, TofuResult, evaluate_metrics, fame, get_metric, known_metrics, tofu
from efface.evaluate.logs import (
    PREFIXES,
    SPLITS,
    check_results,
    model_facts,
    read_json,
    read_log,
    result_names,
    write_results,
)
from efface.evaluate.metrics import Metric, MetricResult, Perplexity, Reading
from efface.evaluate.metrics.fame import GROUPS, split_rows
from efface.evaluate.protocol import PROTOCOLS, get_protocol
from efface.evaluate.runner import Progress, on_first
from efface.evaluate.tofu_evaluation import ROWS, load_split
from efface.files import check_output, in_words, locked_folder, remove_leftovers
from efface.flags import FlagParser, hyphens, positive
from efface.hf.model.loading import MAIN, load_model, load_tokenizer
from efface.hf.text.rows import Rows, check_columns, load_rows, matching, parse_conditions, texts
from efface.hf.text.templates import AUTO, OPEN_UNLEARNING
from efface.hf.text.token_cache import DIGITS, file_digest
from efface.processes import processes

Results = dict[str, MetricResult]


def add_metrics_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``run_metrics`` and ``run_fame``, except those of all benchmarks, such as ``--model``."""
    group = parser.add_argument_group("metrics of any rows")
    group.add_argument("--metrics", help=f"comma-separated, one or more of {', '.join(known_metrics())}")
    group.add_argument("--forget", help="rows to evaluate: a file, or a Hub data set (name[:config[:split]])")
    conditions: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "CONDITION"}
    syntax = "column=value[,value] or column!=value[,value]"
    group.add_argument(
        "--forget-filter", **conditions, help=f"use only these rows of --forget: {syntax}; FAME: the rows to forget"
    )
    group.add_argument("--holdout", help="for mia_* and privleak: similar rows that no model was trained on")
    group.add_argument("--holdout-filter", **conditions, help="use only these rows of --holdout")
    group.add_argument("--reference-model", help="for mia_reference: a checkpoint with the same tokenizer")
    group.add_argument(
        "--retain-metrics", help="for privleak: METRICS_EVAL.json of a model trained on the retain set only"
    )
    group.add_argument(
        "--retain-filter", **conditions, help="FAME: the rows to keep (default: all except those to forget)"
    )
    group.add_argument(
        "--group-columns", nargs="+", default=GROUPS, help=f"FAME: columns to group by (default: {' '.join(GROUPS)})"
    )
    group.add_argument(
        "--question-column",
        default="question",
        help='column of the prompt; "" if rows are plain texts (default: %(default)s)',
    )
    group.add_argument("--answer-column", default="answer", help="column of the answer or text (default: %(default)s)")
    group.add_argument("--max-length", type=int, help="cut texts to this many tokens (default: never)")
    group.add_argument(
        "--window", type=int, help="perplexity: tokens per window; consecutive windows overlap by half (default: 1024)"
    )
    group.add_argument(
        "--max-new-tokens", type=int, default=200, help="most tokens of a generated answer (default: %(default)s)"
    )


def chosen_metrics(options: argparse.Namespace) -> list[Metric]:
    """Return the metrics of ``--metrics`` with the settings of their flags. Nothing is computed yet.

    Raises:
        ValueError: an unknown metric, a setting out of its range, or a metric without a flag that it requires.
    """
    settings = {} if options.window is None else {"window": options.window, "stride": max(1, options.window // 2)}
    names = [name.strip() for name in (options.metrics or "").split(",") if name.strip()]
    chosen = [get_metric(name, **(settings if name.lower() == Perplexity.name else {})) for name in names]
    if chosen and not options.forget:
        raise ValueError("--metrics: expected --forget FILE, the rows to evaluate, got none")
    for metric in chosen:
        if metric.needs_holdout and not options.holdout:
            raise ValueError(f"{metric.name}: expected --holdout FILE, rows that no model was trained on, got none")
        if metric.needs_reference and not options.reference_model:
            raise ValueError(f"{metric.name}: expected --reference-model MODEL, got none")
    return chosen


def check_metrics_rows(options: argparse.Namespace, benchmark: str | None) -> dict[str, str]:
    """Read and check the rows of ``--metrics`` and FAME before a model is loaded.

    Returns:
        For each set with a filter, a message such as ``40 of 400 rows, forget.json``.

    Raises:
        ValueError: a row without text (the message gives its number in the file), a filter without rows to filter, or
            a filter that no row meets.
    """
    reading = _reading(options)
    names = [name for name in (reading.answer_column, reading.question_column) if name is not None]
    filters = {name: getattr(options, f"{name}_filter") for name in ("forget", "holdout", "retain")}
    sources = {name: getattr(options, name) for name in ("forget", "holdout") if options.metrics}
    for name, conditions in filters.items():
        if conditions and not sources.get(name) and (benchmark != "fame" or name == "holdout"):
            raise ValueError(f"--{name}-filter: expected rows to filter, got none; drop it")
    taken: dict[str, str] = {}
    if benchmark == "fame" and options.data and filters["forget"]:
        rows = load_rows(options.data)
        parts = split_rows(rows, filters["forget"], filters["retain"])
        check_columns(rows, options.group_columns, options.data)
        for column in names:
            texts(rows, column, options.data)
        for name, some in parts.items():
            taken[f"FAME {name}"] = f"{len(some):,} of {len(rows):,} rows, {options.data}"
    for name, source in sources.items():
        if source:
            rows = load_rows(source)
            numbers = matching(rows, parse_conditions(filters[name]), source)
            for column in names:
                texts(rows, column, source, numbers)
            if numbers is not None:
                taken[name] = f"{len(numbers):,} of {len(rows):,} rows, {source}"
    return taken


def run_metrics(
    model: Any,
    tokenizer: Any,
    options: argparse.Namespace,
    *,
    store: str | Path | None = None,
    progress: Progress | None = None,
) -> Results:
    """Compute the metrics of ``--metrics`` on the rows of ``--forget``.

    Args:
        model: the model, on its device.
        tokenizer: its tokenizer.
        options: the parsed flags.
        store: SQLite file of finished rows, from which a stopped evaluation continues; None keeps none.
        progress: callback; see ``efface.evaluate.runner.Progress``.

    Raises:
        ValueError: as ``chosen_metrics`` and ``evaluate_metrics``.
    """
    metrics = chosen_metrics(options)
    reference = None
    if options.reference_model is not None:
        reference = load_model(
            options.reference_model, dtype=options.dtype, trust_remote_code=options.trust_remote_code
        ).to(model.device)
    try:
        return evaluate_metrics(
            model,
            tokenizer,
            _rows(options.forget, options.forget_filter),
            metrics,
            holdout=_rows(options.holdout, options.holdout_filter) if options.holdout else None,
            reference_model=reference,
            retain_values=read_values(options.retain_metrics) if options.retain_metrics else None,
            reading=_reading(options),
            store=store,
            progress=progress,
        )
    finally:
        del reference
        gc.collect()


def run_fame(
    model: Any,
    tokenizer: Any,
    options: argparse.Namespace,
    *,
    store: str | Path | None = None,
    progress: Progress | None = None,
) -> Results:
    """Compute FAME's metrics on the rows of ``--data``. Arguments as for ``run_metrics``.

    Raises:
        ValueError: ``--data`` is missing, and as ``fame``.
    """
    if not options.data:
        raise ValueError("--benchmark fame: expected --data FILE with its questions and answers, got none")
    return fame(
        model,
        tokenizer,
        load_rows(options.data),
        forget_filter=options.forget_filter,
        retain_filter=options.retain_filter,
        groups=options.group_columns,
        reading=_reading(options),
        store=store,
        progress=progress,
    )


def read_values(path: str | Path) -> dict[str, float]:
    """Return metric name -> value from a results file such as METRICS_EVAL.json or from its summary.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a results file.
    """
    content = read_json(path, "results file")
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r}: expected metrics by name, got a {type(content).__name__}")  # noqa: TRY004 - invalid content, not a wrong type
    values = {name: value.get("agg_value") if isinstance(value, Mapping) else value for name, value in content.items()}
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}


def _rows(source: str, conditions: list[str] | None) -> Rows:
    rows = load_rows(source)
    numbers = matching(rows, parse_conditions(conditions), source)
    return rows if numbers is None else [rows[i] for i in numbers.tolist()]


def _reading(options: argparse.Namespace) -> Reading:
    return Reading(
        question_column=options.question_column or None,
        answer_column=options.answer_column,
        max_length=options.max_length,
        template=options.template,
        max_new_tokens=options.max_new_tokens,
        token_budget=options.token_budget,
    )


_EXAMPLES = """
examples:
  efface evaluate --model ./npo --retain-log retain90/TOFU_EVAL.json
  efface evaluate --model ./npo --retain-model ./retain90 --data tofu/ --split forget05
  efface evaluate --model ./npo --metrics privleak,mia_min_k --forget a.csv \\
      --holdout b.csv
  efface evaluate --model ./npo --benchmark fame --data fame.csv \\
      --forget-filter topic_id=3

Forget Quality compares the model with one trained on the retain set only. Give its
TOFU_EVAL.json (--retain-log), or the model itself (--retain-model), which is then
evaluated first. Run a stopped evaluation again to continue it.
`torchrun -m efface evaluate ...` distributes the rows over processes.
"""
T = TypeVar("T")

_RESULTS = [name for benchmark in ("TOFU", "FAME", "METRICS") for name in result_names(benchmark)]

_TITLES = {"forget": "forget", "retain": "retain", "real_authors": "real authors", "world_facts": "world facts"}


def parser() -> FlagParser:
    """Return the parser of the command's flags."""
    flags = FlagParser(
        "evaluate",
        "Runs TOFU's evaluation: probability, ROUGE-L recall and truth ratio on four splits, Model Utility and "
        "Forget Quality. Writes TOFU_EVAL.json and TOFU_SUMMARY.json in open-unlearning's format. Also runs FAME's "
        "evaluation (FAME_EVAL.json), or other metrics on any rows (METRICS_EVAL.json).",
        _EXAMPLES,
    )
    flags.add_argument("--model", required=True, help="checkpoint folder or Hub name")
    flags.add_argument(
        "--revision", default=MAIN, help="branch, tag or commit on the Hub; for a folder, a checkpoint inside it"
    )
    flags.add_argument("--tokenizer", help="folder or Hub name (default: that of the model)")
    flags.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a checkpoint")
    flags.add_argument(
        "--benchmark",
        choices=("tofu", "fame"),
        help="evaluation to run (default: tofu, or none with --metrics)",
    )
    flags.add_argument(
        "--data", help="TOFU: folder with its files, or a Hub data set (default: locuslab/TOFU); FAME: its file"
    )
    flags.add_argument("--split", default="forget10", help="forget split: forget01, forget05 or forget10 (default)")
    flags.add_argument(
        "--splits",
        nargs="+",
        choices=SPLITS,
        default=SPLITS,
        metavar="NAME",
        help=f"evaluate only these of {', '.join(SPLITS)}",
    )
    flags.add_argument(
        "--protocol",
        choices=sorted(PROTOCOLS),
        default="open-unlearning",
        help="code base of rows, lengths and formulas; tofu: also of labels and prompts (default: %(default)s)",
    )
    flags.add_argument(
        "--compat",
        choices=(OPEN_UNLEARNING,),
        help="with --protocol open-unlearning: also its labels, prompts and attention mask; slow",
    )
    retain = flags.add_mutually_exclusive_group()
    retain.add_argument("--retain-log", help="evaluation log of a model trained on the retain set only")
    retain.add_argument(
        "--retain-model", help="model trained on the retain set only; it is evaluated first, into OUTPUT/retain_model"
    )
    flags.add_argument("--retain-revision", default=MAIN, help="revision of --retain-model")
    flags.add_argument(
        "--output",
        type=Path,
        help="folder for the results (default: MODEL/evaluation; for a checkpoint MODEL/REVISION/evaluation; for a "
        "Hub model ./evaluation/NAME)",
    )
    said = "replace the results in the folder (default: keep those of the same model and settings, refuse others)"
    flags.add_argument("--overwrite", action="store_true", help=said)
    flags.add_argument("--template", default=AUTO, help="prompt format, as for efface unlearn")
    flags.add_argument(
        "--token-budget", type=positive, default=8192, help="maximum tokens per forward pass (default: %(default)s)"
    )
    flags.add_argument("--dtype", default="auto", help="dtype to load models in: auto, float32, bfloat16 or float16")
    add_json_flag(flags)
    add_metrics_flags(flags)
    return flags


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    state = processes()
    console = open_console(stderr=True, quiet=not state.is_main_process)
    output = options.output or _default_output(options.model, options.revision)
    benchmark = options.benchmark or (None if options.metrics else "tofu")
    chosen_metrics(options)  # raises for invalid flags now, not after hours of TOFU's evaluation
    if benchmark != "tofu" and (options.retain_log or options.retain_model):
        raise ValueError(
            "--retain-log, --retain-model: expected --benchmark tofu with them, got none; for privleak give "
            "--retain-metrics"
        )
    if options.compat is not None:
        get_protocol(options.protocol, options.compat)
        if benchmark != "tofu" or options.metrics:
            raise ValueError(
                "--compat: expected TOFU's evaluation, got "
                f"{'--metrics' if options.metrics else f'--benchmark {benchmark}'}; drop it"
            )
    read = ("retain_log", "retain_metrics", "data", "forget", "holdout")
    check_output(
        output,
        overwrite=True,
        inputs={f"--{hyphens(name)}": getattr(options, name) for name in read},
        replaced=(*_RESULTS, ROWS),
    )
    if options.retain_metrics:
        read_values(options.retain_metrics)
    if benchmark == "tofu":
        _check_tofu(options)
    for role, counts in check_metrics_rows(options, benchmark).items():
        console.print(f"{role}: {counts}")
    found: dict[str, Any] = {"output": output}
    if benchmark == "tofu":
        found["tofu"] = _evaluate_tofu(options, output, console)
    if benchmark == "fame":
        found["fame"] = _evaluate_rows(options, output, console, "FAME", run_fame)
    if options.metrics:
        found["metrics"] = _evaluate_rows(options, output, console, "METRICS", run_metrics)
    if options.json and state.is_main_process:
        show_json(found)
    console.print(f"wrote {output}")
    return 0


def _check_tofu(options: argparse.Namespace) -> None:
    """Read the local files of TOFU's evaluation, to raise their errors before a model is loaded."""
    if options.retain_log is not None and "forget" in options.splits:
        read_log(options.retain_log).rows("forget", "truth_ratio")
    if options.data is not None and Path(options.data).expanduser().exists():
        for split in options.splits:
            load_split(options.data, split, options.split, get_protocol(options.protocol, options.compat))


def _evaluate_tofu(options: argparse.Namespace, output: Path, console: Console) -> dict[str, Any]:
    """Run TOFU's evaluation, print its table (unless ``--json``), and return the figures of TOFU_SUMMARY.json."""
    retain_log: str | EvalLog | None = options.retain_log
    if options.retain_model is not None:
        folder = output / "retain_model"
        retain_log = _evaluate(options, options.retain_model, options.retain_revision, folder, None, console).log
    result = _evaluate(options, options.model, options.revision, output, retain_log, console)
    if processes().is_main_process:
        if not options.json:
            protocol = get_protocol(options.protocol, options.compat).name
            open_console().print(results_table(result, f"{Path(options.model).name} on {options.split}, {protocol}"))
        for note in _notes(result, options):
            console.print(note)
    return dict(result.summary)


def _evaluate_rows(
    options: argparse.Namespace, output: Path, console: Console, benchmark: str, judge: Callable[..., Results]
) -> Results:
    """Run FAME's or other metrics, print their table (unless ``--json``), and return the figures.

    The returned figures include those of groups, but not those of single rows.
    """

    def run(model: Any, tokenizer: Any, bar: Bar) -> Results:
        facts = {
            **model_facts(model),
            "benchmark": benchmark,
            "options": {**vars(options), "output": str(output)},
            "content": _digests(options, ("data",) if benchmark == "FAME" else ("forget", "holdout")),
        }
        if not options.overwrite:
            on_first(processes(), lambda: check_results(output, facts, benchmark=benchmark))
        results = judge(model, tokenizer, options, store=output / ROWS, progress=bar.follow)
        if processes().is_main_process:
            write_results(output, results, facts, benchmark=benchmark, beside=not options.overwrite)
        return results

    results = _with_model(options, options.model, options.revision, output, console, run)
    if processes().is_main_process and not options.json:
        open_console().print(metrics_table(results, f"{Path(options.model).name}: {benchmark}"))
    return {
        name: {key: value for key, value in metric.items() if key != "value_by_index"}
        for name, metric in results.items()
    }


def _digests(options: argparse.Namespace, names: Sequence[str]) -> dict[str, str]:
    """Return digests of the local files of rows, because a file can change while its path stays the same."""
    paths = {name: Path(source).expanduser() for name in names if (source := getattr(options, name)) is not None}
    return {name: file_digest(path)[:DIGITS] for name, path in paths.items() if path.is_file()}


def _evaluate(
    options: argparse.Namespace,
    name: str,
    revision: str,
    output: Path,
    retain_log: str | EvalLog | None,
    console: Console,
) -> TofuResult:
    def run(model: Any, tokenizer: Any, bar: Bar) -> TofuResult:
        return tofu(
            model,
            tokenizer,
            options.data,
            split=options.split,
            splits=options.splits,
            protocol=options.protocol,
            compat=options.compat,
            retain_log=retain_log,
            template=options.template,
            token_budget=options.token_budget,
            output=output,
            overwrite=options.overwrite,
            progress=bar.follow,
        )

    return _with_model(options, name, revision, output, console, run)


def _with_model(
    options: argparse.Namespace,
    name: str,
    revision: str,
    output: Path,
    console: Console,
    run: Callable[[Any, Any, Bar], T],
) -> T:
    """Load a model and its tokenizer, call ``run`` with them, and free the memory."""
    bar = Bar(console, Path(name).name)
    with closing(bar):
        try:
            bar.stage("loading the model")
            trusted, given = options.trust_remote_code, options.tokenizer
            tokenizer = load_tokenizer(given or name, revision=MAIN if given else revision, trust_remote_code=trusted)
            model = load_model(name, revision=revision, dtype=options.dtype, trust_remote_code=trusted)
            model = model.to(processes().device)
            first = processes().is_main_process
            with locked_folder(output) if first else nullcontext():
                if first:
                    remove_leftovers(output)
                there = sorted(path for path in output.glob("*.json") if path.name in _RESULTS)
                if there and options.overwrite:
                    console.print(f"replaced: {in_words(there)}")
                return run(model, tokenizer, bar)
        except KeyboardInterrupt:
            kept = f"{bar.completed} of {bar.total} rows are saved in {output}"
            console.print(f"stopped; run the same command again to continue: {kept}")
            raise
        finally:
            model = None  # before the next one is loaded
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def metrics_table(results: Results, title: str) -> Table:
    """Return a table with one line for each metric, and for each group of its rows."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("")
    for heading in ("rows", "value"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, metric in results.items():
        rows = len(metric.get("value_by_index", ()))  # 0 for an attack, which compares two sets of rows
        table.add_row(name, str(rows or ""), f"{metric['agg_value']:.4f}")
        for grouping, groups in metric.items():
            if grouping.startswith("by_"):
                for value, group in groups.items():
                    label = f"  {grouping.removeprefix('by_')} {value}"
                    table.add_row(label, str(group["rows"]), f"{group['agg_value']:.4f}")
    return table


def _default_output(model: str, revision: str) -> Path:
    """Return the default output folder: ``evaluation`` inside the model or its checkpoint, where a report searches."""
    folder, inside = Path(model).expanduser(), Path() if revision == MAIN else Path(revision)
    return folder / inside / "evaluation" if folder.is_dir() else Path("evaluation") / folder.name / inside


def results_table(result: TofuResult, title: str) -> Table:
    """Return the table of a result: one line for each split, then Model Utility and Forget Quality."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("")
    for heading in ("rows", "probability", "ROUGE-L recall", "truth ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for split in SPLITS[-1:] + SPLITS[:-1]:
        prefix = PREFIXES[split]
        if f"{prefix}_Q_A_Prob" not in result.summary:
            continue
        normalised = "_normalised" if split in ("real_authors", "world_facts") else ""
        ratio = "forget_truth_ratio" if split == "forget" else f"{prefix}_Truth_Ratio"
        names = (f"{prefix}_Q_A_Prob{normalised}", f"{prefix}_Q_A_ROUGE", ratio)
        rows = len(result.log.rows(split, "truth_ratio"))
        table.add_row(_TITLES[split], str(rows), *(f"{result.summary[name]:.4f}" for name in names))
    table.add_section()
    for name in ("model_utility", "forget_quality"):
        value = result.summary.get(name)
        table.add_row(name.replace("_", " "), "", "", "", "-" if value is None else f"{value:.4g}")
    return table


def _notes(result: TofuResult, options: argparse.Namespace) -> list[str]:
    """Return the notes printed below the table: empty generations, and how to get a forget quality."""
    notes = [
        f"{count} of {len(result.log.rows(split, 'rouge'))} generations of the {_TITLES[split]} split contain no "
        "word that ROUGE counts, as if the model answered nothing; their ROUGE is 0"
        for split, count in result.empty.items()
        if count
    ]
    if "forget_quality" not in result.summary and "forget" in result.empty:
        retained = options.split.replace("forget", "retain")
        notes.append(
            "no forget quality: it requires a model trained on the retain set only. Train one on the data of this "
            f"model without {options.split} (TOFU's {_complement(retained)}), and add --retain-model "
            "FOLDER, or evaluate it with this command and add --retain-log FOLDER/TOFU_EVAL.json"
        )
    return notes


def _complement(name: str) -> str:
    """Return retain90 for retain10, the name that belongs to forget10."""
    share = name.removeprefix("retain")
    return f"retain{100 - int(share):02d}" if share.isdigit() else "retain split"
