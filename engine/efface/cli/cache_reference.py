"""``efface cache-reference``: compute the reference log-probabilities of a forget set before any run."""

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

Takes the flags of `efface unlearn` and the same --config files. A run can use the
result only if it has the same model, forget set, template, --dtype and --bf16.
"""
# The flags of `efface unlearn` that a reference depends on, and that choose where it is stored.
_SHOWN = (
    "model forget forget_filter revision dtype bf16 question_column answer_column alternate_column refusal_file "
    "template max_length objective reference_model reference_revision reference_cache token_budget use_cpu recipe "
    "data"
)


def parser() -> SettingsParser:
    """Return the parser of the command's flags."""
    return unlearn_parser(
        "cache-reference",
        "Computes the reference log-probabilities of NPO, DPO and similar objectives once for all runs on the same "
        "model and forget set.",
        _EXAMPLES,
        shown=frozenset(_SHOWN.split()),
    )


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    command, args = parse(argv, parser())
    if command.dry_run or command.json:
        name = "--dry-run" if command.dry_run else "--json"
        raise ValueError(f"{name}: not a flag of `efface cache-reference`; use `efface unlearn --dry-run`")
    if not command.make_objective().needs_reference:
        raise ValueError(
            f"--objective: expected an objective that needs a reference, such as npo, got {command.objective}"
        )
    if command.reference not in ("auto", "cached") or args.reference_cache == NO_FILE:
        raise ValueError(
            f"--reference, --reference-cache: expected cached and a file, got {command.reference} and "
            f"{args.reference_cache}; this command writes the file"
        )
    check_inputs(replace(command, retain=None), args)
    if args.reference_cache is not None:
        LogprobStore(
            args.reference_cache
        ).close()  # raises now, not after the computation, if the file cannot be written
    console = open_console(stderr=True, quiet=args.process_index != 0)
    bar = ProgressBar(console, Path(command.reference_model or command.model).name)
    with tempfile.TemporaryDirectory() as nothing, contextlib.closing(bar):
        args.output_dir = nothing  # the trainer creates its output folder when it is constructed
        args.push_to_hub = args.revision_per_checkpoint = False  # and its repository on the Hub
        # The reference does not depend on the retain set.
        command = replace(command, retain=None, retain_filter=None, alpha=0.0, reference="cached")
        trainer, _ = make_trainer(command, args, command.make_objective(), bar)
    reference = trainer.reference
    if not isinstance(reference, CachedReference):
        raise TypeError(f"expected a cached reference, got {type(reference).__name__}")
    if reference.problem is not None:
        raise reference.problem
    cached = reference.sequences - reference.computed
    console.print(f"{reference.computed} sequences computed, {cached} already cached: {reference.path}")
    return 0
