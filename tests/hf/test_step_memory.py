"""What a training step needs above the model, against the padded eager step with its second model."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.helpers import LONG, kibibytes
from support.processes import RANKS, environment


def peak(kind: str, width: int, vocabulary: int) -> float:
    """MiB above the model, measured in a process of its own."""
    done = subprocess.run(
        [sys.executable, RANKS / "step_memory.py", kind, str(width), str(vocabulary)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


def available() -> int:
    """GiB that this machine can give."""
    return kibibytes("/proc/meminfo", "MemAvailable") >> 20


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("width", "vocabulary"), [(128, 64_000), pytest.param(512, 128_256, marks=LONG)])
def test_a_step_needs_at_most_45_percent_of_the_eager_ones_memory(width: int, vocabulary: int) -> None:
    """Llama, 8 layers, d = width, 16 pairs, fp32, NPO: forward, backward and SGD; theirs without SGD.

    Both hold a second model; a cached reference needs less.
    """
    if available() < 8:
        pytest.skip("less than 8 GiB of memory is free: the machine might kill other tests")
    assert peak("live", width, vocabulary) <= 0.45 * peak("eager", width, vocabulary)
