"""``efface plan``: show the steps, micro-batches and tokens of an epoch without loading a model."""

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from transformers.hf_argparser import string_to_bool

from efface.batching import EpochPlan, EpochPlanner, TokenStore
from efface.cli.progress import Bar, add_json_flag, open_console, show_json
from efface.flags import FlagParser
from efface.hf.model.loading import load_tokenizer, read_tokenizer
from efface.hf.text.data import DataFacts, refuse_overlap, token_store
from efface.hf.text.rows import check_source
from efface.hf.text.templates import AUTO
from efface.hf.train.arguments import UnlearnArguments

_EXAMPLES = """
examples:
  efface plan --tokenizer ./llama --forget forget10.json --retain retain90.json \\
      --processes 1 8
  efface plan --tokenizer ./llama --forget forget10.json --token-budget 2048 --json
"""


def parser() -> FlagParser:
    """Return the parser of the command's flags."""
    flags = FlagParser(
        "plan",
        "Tokenises the data and plans an epoch: optimizer steps, micro-batches, tokens, the tokens that padding would "
        "add, and those that shared prefixes save. Loads no model.",
        _EXAMPLES,
    )
    flags.add_argument("--tokenizer", required=True, help="folder or Hub name of a checkpoint with a tokenizer")
    flags.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a checkpoint")
    flags.add_argument("--forget", required=True, help="what to forget: a file or Hub data set, as for efface unlearn")
    flags.add_argument("--retain", help="what to keep, as --forget")
    flags.add_argument(
        "--pairs-per-step", type=int, default=32, help="forget/retain pairs of an optimizer step (default: 32)"
    )
    flags.add_argument(
        "--token-budget",
        type=int,
        default=UnlearnArguments.token_budget,
        help="maximum tokens per forward pass (default: %(default)s)",
    )
    flags.add_argument(
        "--share-prefixes",
        type=string_to_bool,
        nargs="?",
        const=True,
        default=UnlearnArguments.share_prefixes,
        metavar="BOOL",
        help="run shared prefixes once, as for efface unlearn (default: true)",
    )
    flags.add_argument(
        "--processes", type=int, nargs="+", default=[1], help="numbers of processes to plan for (default: 1)"
    )
    flags.add_argument(
        "--retain-sampling",
        choices=["random", "cycle", "paired"],
        default="random",
        help="how retain rows are drawn (default: random)",
    )
    flags.add_argument(
        "--seed", type=int, default=42, help="seed of the order and of the drawn retain rows (default: 42)"
    )
    flags.add_argument("--epoch", type=int, default=0, help="number of the epoch to plan, from 0 (default: 0)")
    flags.add_argument("--template", default=AUTO, help="prompt format, as for efface unlearn")
    flags.add_argument("--max-length", type=int, help="cut sequences to this many tokens (default: never)")
    flags.add_argument("--question-column", help="column of the prompt")
    flags.add_argument("--answer-column", help="column of the answer")
    conditions: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "CONDITION"}
    flags.add_argument("--forget-filter", **conditions, help="rows to forget, as for efface unlearn")
    flags.add_argument("--retain-filter", **conditions, help="rows to keep, as for efface unlearn")
    flags.add_argument(
        "--allow-overlap", action="store_true", help="allow rows that are in both sets, an error by default"
    )
    add_json_flag(flags)
    return flags


def padded_tokens(plan: EpochPlan, forget: TokenStore, retain: TokenStore, alternate: TokenStore | None = None) -> int:
    """Return the tokens of the epoch if every step padded one batch of each store to the longest sequence in it."""
    total = 0
    for step in range(len(plan)):
        forgotten, retained = plan.pairs(step)
        batches = [(forget, forgotten), (retain, retained)]
        if alternate is not None:
            batches.append((alternate, forgotten))
        for store, index in batches:
            lengths = store.lengths[index]
            total += int(lengths.max(initial=0)) * len(lengths)
    return total


def summary(planner: EpochPlanner, epoch: int) -> dict[str, Any]:
    """Return the figures of an epoch's plan, by their names in the JSON document of ``efface plan --json``.

    ``tokens`` are those that the model runs. ``efficiency`` is None if every process has a single micro-batch in every
    step.
    """
    plan = planner.plan(epoch)
    tokens, unshared = planner.tokens(plan)
    whole = sum(int(each.lengths[plan.sequences[plan.roles == role]].sum()) for role, each in enumerate(planner.stores))
    filled = plan.efficiency()
    micro_batches = np.diff(plan.step_offsets) // plan.world_size
    return {
        "processes": plan.world_size,
        "steps": len(plan),
        "micro_batches_per_step": float(micro_batches.mean()),
        "tokens": tokens,
        "prefixes_saved": 1 - tokens / unshared,
        "padding_saved": 1 - whole / padded_tokens(plan, *planner.stores),
        "efficiency": None if np.isnan(filled) else filled,
        "efficiency_with_last": plan.efficiency(last=True),
    }


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    console = open_console(stderr=True)
    with closing(Bar(console, "plan")) as bar:
        bar.stage("reading the data")
        forget, retain = _stores(options)
    for role, store in (("forget", forget), ("retain", retain)):
        if len(store):
            facts = DataFacts.of(getattr(options, role), store, getattr(options, f"{role}_filter"))
            console.print(f"{role}: {facts}")
    rows = []
    for processes in options.processes:
        planner = EpochPlanner(
            (forget, retain),
            share=options.share_prefixes,
            last_tokens=False,
            pairs_per_step=options.pairs_per_step,
            token_budget=options.token_budget,
            world_size=processes,
            seed=options.seed,
            retain_sampling=options.retain_sampling,
        )
        rows.append(summary(planner, options.epoch))
    if options.json:
        show_json(rows)
    else:
        open_console().print(_table(rows, len(forget), len(retain)))
    return 0


def _stores(options: argparse.Namespace) -> tuple[TokenStore, TokenStore]:
    """Return the tokens of the forget and the retain set.

    Raises:
        ValueError: the sets share a row, without ``--allow-overlap``.
    """
    for source in (options.forget, options.retain):
        check_source(source)
    folder, trusted = Path(options.tokenizer).expanduser(), options.trust_remote_code
    if folder.is_dir():
        tokenizer = read_tokenizer(folder, trust_remote_code=trusted)
    else:
        tokenizer = load_tokenizer(options.tokenizer, trust_remote_code=trusted)
    names = ("template", "max_length", "question_column", "answer_column")
    settings = {name: getattr(options, name) for name in names}
    forget = token_store(options.forget, tokenizer, name="forget", rows_filter=options.forget_filter, **settings)
    retain = TokenStore.empty()
    if options.retain is not None:
        retain = token_store(options.retain, tokenizer, name="retain", rows_filter=options.retain_filter, **settings)
    elif options.retain_filter:
        raise ValueError(
            "--retain-filter: expected --retain with the rows to filter, got none; give --retain, or drop the filter"
        )
    if not options.allow_overlap:
        refuse_overlap(forget, retain)
    return forget, retain


def _table(rows: Sequence[dict[str, Any]], forget: int, retain: int) -> Table:
    title = f"an epoch over {forget:,} forget and {retain:,} retain sequences"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    headings = (
        "processes",
        "steps",
        "passes",
        "tokens",
        "shared",
        "no padding",
        "filled",
        "with last",
    )  # with 9 digits of tokens and 5 of steps the table has 79 columns
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        filled = "-" if row["efficiency"] is None else f"{row['efficiency']:.1%}"
        table.add_row(
            str(row["processes"]),
            f"{row['steps']:,}",
            f"{row['micro_batches_per_step']:.2f}",
            f"{row['tokens']:,}",
            f"{row['prefixes_saved']:.1%}",
            f"{row['padding_saved']:.1%}",
            filled,
            f"{row['efficiency_with_last']:.1%}",
        )
    table.caption = (
        "passes: forward passes of a process in a step. tokens: those that are run. shared: share of tokens saved "
        "because sequences share prefixes. no padding: share of tokens saved compared with padded steps. "
        "filled: used share of the token budget, without the last pass of each process in a step. with last: the same "
        "with those passes, which contain the remaining sequences"
    )
    return table
