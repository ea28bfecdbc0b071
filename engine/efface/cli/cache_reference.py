"""``efface cache-reference``: compute what objectives with a reference compare with, before any run."""

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from efface.cli.progress import ProgressBar, open_console
from efface.cli.training import check_inputs, make_trainer
from efface.hf.reference.cached import NO_FILE, CachedReference
from efface.recipes.flags import SettingsParser
from efface.recipes.settings import parse, unlearn_parser
from efface.reference import LogprobStore

_EXAMPLES = """
examples:
  efface cache-reference --model ./llama --forget forget10.json --bf16 True
  efface cache-reference --config npo.yaml

Takes the flags of `efface unlearn`, and a run's file of them. What a log-probability
depends on has to be the same in both: the model, the forget set and its template,
--dtype and --bf16.
"""
# Of the flags of `efface unlearn`, those that a reference depends on, and where it is kept.
_SHOWN = (
    "model forget forget_filter revision dtype bf16 question_column answer_column alternate_column refusal_file "
    "template max_length objective reference_model reference_revision reference_cache token_budget use_cpu recipe "
    "data"
)


def parser() -> SettingsParser:
    """Return the parser of the command's flags."""
    return unlearn_parser(
        "cache-reference",
        "Computes the log-probabilities that NPO, DPO and the like compare with, once for all runs on the same model "
        "and forget set.",
        _EXAMPLES,
        shown=frozenset(_SHOWN.split()),
    )


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    command, args = parse(argv, parser())
    if command.dry_run or command.json:
        name = "--dry-run" if command.dry_run else "--json"
        raise ValueError(f"{name}: `efface cache-reference` has none; see `efface unlearn --dry-run`")
    if not command.make_objective().needs_reference:
        raise ValueError(f"--objective {command.objective}: expected one that compares with a reference, such as npo")
    if command.reference not in ("auto", "cached") or args.reference_cache == NO_FILE:
        raise ValueError("expected --reference cached and a --reference-cache that is a file: they are to be filled")
    check_inputs(replace(command, retain=None), args)
    if args.reference_cache is not None:
        LogprobStore(args.reference_cache).close()  # a place that cannot be written is said before the work
    console = open_console(stderr=True, quiet=args.process_index != 0)
    bar = ProgressBar(console, Path(command.reference_model or command.model).name)
    with tempfile.TemporaryDirectory() as nothing, contextlib.closing(bar):
        args.output_dir = nothing  # a trainer makes its folder at once
        args.push_to_hub = args.revision_per_checkpoint = False  # and its repository
        # the retain set has no part in the reference
        command = replace(command, retain=None, retain_filter=None, alpha=0.0, reference="cached")
        trainer, _ = make_trainer(command, args, command.make_objective(), bar)
    reference = trainer.reference
    if not isinstance(reference, CachedReference):
        raise TypeError(f"expected a cached reference, got {type(reference).__name__}")
    if reference.problem is not None:
        raise reference.problem
    there = reference.sequences - reference.computed
    console.print(f"{reference.computed} sequences computed, {there} were there: {reference.path}")
    return 0
