"""What suites share: options, who is left out, and the rows and the models that they are given.

A suite is a package with a module ``suite``, which has

- ``SHAPES``, of which one called "smoke" runs only on demand; ``default_shapes(options)`` where they depend on options;
- ``ROUNDS``, of which each calls every provider once (``timing.interleaved``);
- ``run(options, report)``, which measures, and keeps a dataclass a provider and shape: ``timing.spread`` of its rounds,
  and what else the suite says (``report.Report.save``);
- ``add_arguments(parser)`` where it can be asked more than every suite.

Providers that compute something else are refused before anything is timed, and whoever cannot run here is skipped
(``able``): both with a reason, in ``not_measured`` or in a note.
"""

import argparse
import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:  # the driver of a borrowed GPU reads BadOption, and imports little
    import numpy as np

ENVIRONMENT = "EFFACE_TOFU"
FOLDER = Path(os.environ.get(ENVIRONMENT) or Path(__file__).resolve().parents[3] / "shared" / "tofu")
"""Where TOFU's files are looked for: what the environment names, else beside the checkout."""

# Llamas as ``LlamaConfig`` takes them; their weights are random.
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
    """A provider as a suite declares it."""

    @property
    def name(self) -> str:
        """In tables, and in ``--without``."""


P = TypeVar("P", bound=Named)


class BadOption(ValueError):  # noqa: N818 - not an error of the program
    """An option of a command line that its parser lets pass."""


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def add_without(parser: argparse.ArgumentParser) -> None:
    """Add ``--without TEXT``."""
    parser.add_argument(
        "--without", action="append", default=[], metavar="TEXT", help="leave out providers with TEXT in their name"
    )


def check_without(without: Sequence[str], names: Collection[str]) -> None:
    """Raise ``BadOption`` for a text that is part of no provider's name."""
    for text in without:
        if not any(text in name for name in names):
            listed = ", ".join(map(repr, names))
            raise BadOption(f"--without: expected a part of a provider's name, got {text!r}; they are {listed}")


def left_out(name: str, without: Sequence[str]) -> bool:
    """Whether a text of ``without`` is part of the name."""
    return any(text in name for text in without)


def able(
    declared: Iterable[P], without: Sequence[str], why_not: Callable[[P], str | None]
) -> tuple[list[P], list[str]]:
    """Return those that are not left out and can run here, and why others cannot: ``name: reason``."""
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
    """Return TOFU's files of these names; none where not all are at hand."""
    files = [FOLDER / f"{name}.json" for name in names]
    return files if all(file.is_file() for file in files) else []


def tofu_lengths(rng: "np.random.Generator", sequences: int) -> list[int]:
    """Draw lengths like those of TOFU's rows under an 8k BPE: mean 57, p95 82, none over 139.

    A log-normal with that mean and p95 has σ = 0.24.
    """
    drawn = rng.lognormal(math.log(55.4), 0.24, sequences)
    return [int(x) for x in drawn.round().clip(8, 139)]
