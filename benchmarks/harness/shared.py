"""Options, selection of providers, and rows and models that the suites share.

A suite is a package with a module ``suite`` that defines

- ``SHAPES``, in which shapes whose names begin with "smoke" run only on request, and ``default_shapes(options)`` if the
  default shapes depend on the options;
- ``ROUNDS``, the default number of rounds. Each round calls every provider once (``timing.interleaved``);
- ``run(options, report)``, which measures and saves a dataclass per provider and shape (``report.Report.save``): the
  ``timing.spread`` of its rounds and the suite's other fields;
- ``add_arguments(parser)``, if the suite has options of its own.

A provider that computes something else is rejected before anything is timed. A provider that cannot run on this machine
is skipped (``able``). The reasons for both are in ``not_measured`` or in a note.
"""

import argparse
import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:  # the driver of a borrowed GPU imports BadOption from here, and avoids heavy imports
    import numpy as np

ENVIRONMENT = "EFFACE_TOFU"
FOLDER = Path(os.environ.get(ENVIRONMENT) or Path(__file__).resolve().parents[3] / "shared" / "tofu")
"""Folder with TOFU's files: from the environment variable, or next to the checkout."""

# Arguments of ``LlamaConfig`` for models with random weights.
LLAMA: dict[str, Any] = {"max_position_embeddings": 512, "tie_word_embeddings": False, "use_cache": False}
LLAMA_SMOKE = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA_MID = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
}


class Named(Protocol):
    """A provider of a suite."""

    @property
    def name(self) -> str:
        """The name in tables, which ``--without`` searches."""


P = TypeVar("P", bound=Named)


class BadOption(ValueError):  # noqa: N818 - an error of the user, not of the program
    """An invalid option of a command line that its parser does not detect."""


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def add_without(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--without", action="append", default=[], metavar="TEXT", help="leave out providers with TEXT in their name"
    )


def check_without(without: Sequence[str], names: Collection[str]) -> None:
    """Raise ``BadOption`` if a text is part of no provider's name."""
    for text in without:
        if not any(text in name for name in names):
            listed = ", ".join(map(repr, names))
            raise BadOption(f"--without: expected a part of a provider's name, got {text!r}; they are {listed}")


def left_out(name: str, without: Sequence[str]) -> bool:
    """Return whether a text of ``without`` is part of the name."""
    return any(text in name for text in without)


def able(
    declared: Iterable[P], without: Sequence[str], why_not: Callable[[P], str | None]
) -> tuple[list[P], list[str]]:
    """Return the providers that were not left out and can run here, and ``name: reason`` for those that cannot."""
    kept: list[P] = []
    missing: list[str] = []
    for each in declared:
        if not left_out(each.name, without):
            reason = why_not(each)
            if reason is None:
                kept.append(each)
            else:
                missing.append(f"{each.name}: {reason}")
    return kept, missing


def tofu_files(*names: str) -> list[Path]:
    """Return the paths of TOFU's files with these names; an empty list if any of them does not exist."""
    files = [FOLDER / f"{name}.json" for name in names]
    return files if all(file.is_file() for file in files) else []


def tofu_lengths(rng: "np.random.Generator", sequences: int) -> list[int]:
    """Draw lengths like those of TOFU's rows with an 8k BPE: mean 57, p95 82, at most 139.

    A log-normal distribution with that mean and p95 has σ = 0.24.
    """
    drawn = rng.lognormal(math.log(55.4), 0.24, sequences)
    return [int(x) for x in drawn.round().clip(8, 139)]
