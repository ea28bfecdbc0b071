"""TOFU's files, and the lengths of its rows where the files are not at hand."""

import os
from pathlib import Path

import numpy as np

ENVIRONMENT = "EFFACE_TOFU"
FOLDER = Path(os.environ.get(ENVIRONMENT) or Path(__file__).resolve().parents[2] / "shared" / "tofu")
"""Where the files are looked for: what the environment names, else beside the checkout."""


def lengths(rng: np.random.Generator, sequences: int) -> list[int]:
    """Draw lengths like those of TOFU's rows under an 8k BPE: mean 57, p95 82, none over 139.

    A log-normal with that mean and p95 has σ = 0.24.
    """
    return [int(x) for x in np.clip(np.round(rng.lognormal(np.log(55.4), 0.24, sequences)), 8, 139)]
