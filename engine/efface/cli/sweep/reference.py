"""The reference of a sweep: computed once, before the first trial, into the cache that all trials read."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from efface.cli.sweep.flags import SweepCommand
from efface.hf.cached_reference import NO_FILE
from efface.hf.reference import reference_kind
from efface.recipes.flags import flag_words
from efface.sweep.results import alone, last_lines, write_whole

RECORD = "reference.json"
# Swept, these make references of their own; the trials then fill the cache, which takes many writers.
_OF_THE_REFERENCE = {
    *("objective", "model", "revision", "dtype", "bf16", "fp16", "tf32", "forget", "forget_filter", "seed"),
    *("refusal_file", "alternate_column", "template", "system_prompt", "date_string", "max_length"),
    *("reference", "reference_cache"),
}

Fill = Callable[[Sequence[str], Path], int]


def fill_in_a_process(words: Sequence[str], log: Path) -> int:
    """Run ``efface cache-reference`` in a process of its own, which gives its memory back; return its exit code."""
    command = [sys.executable, "-m", "efface", "cache-reference", *words]
    with log.open("ab") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode  # noqa: S603 - our own command


def fill_reference(sweep: SweepCommand, fill: Fill, say: Callable[[str], None]) -> None:
    """Compute the reference, if the trials share a cached one and this machine has not done so for this sweep.

    Raises:
        ValueError: it could not be computed; no trial could then run.
    """
    if not _is_shared(sweep):
        return
    record, log = sweep.out / RECORD, sweep.out / "reference.log"
    with alone(sweep.out / "reference.lock"):
        if record.is_file():
            return
        say("reference: once for all trials")
        first = {parameter.name: parameter.some()[0] for parameter in sweep.space}
        code = fill([*sweep.words, *flag_words(first)], log)
        if code:
            raise ValueError(f"the reference of all trials cannot be computed, exit code {code}: {last_lines(log)}")
        said = last_lines(log, 1)
        write_whole(record, json.dumps({"said": said, "process": os.getpid()}))
        say(f"reference: {said}")


def _is_shared(sweep: SweepCommand) -> bool:
    if any(parameter.name in _OF_THE_REFERENCE or parameter.name.startswith("reference_") for parameter in sweep.space):
        return False
    objective = sweep.command.make_objective()
    if sweep.args.reference_cache == NO_FILE or sweep.command.reference not in ("auto", "cached"):
        return False
    return reference_kind(sweep.command.reference, objective, None, padded=sweep.args.compat is not None) == "cached"
