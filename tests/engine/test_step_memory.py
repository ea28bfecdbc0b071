"""What a training step needs above the model, against the padded eager step with its second model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LONG = pytest.mark.skipif("EFFACE_LONG" not in os.environ, reason="takes minutes: EFFACE_LONG=1 runs it")


def peak(kind: str, width: int, vocabulary: int) -> float:
    """MiB above the model, measured in a process of its own."""
    script = Path(__file__).with_name("step_memory.py")
    done = subprocess.run(
        [sys.executable, script, kind, str(width), str(vocabulary)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


def available() -> int:
    """GiB that this machine can give."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) >> 20


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("width", "vocabulary"), [(128, 64_000), pytest.param(512, 128_256, marks=LONG)])
def test_a_step_needs_at_most_45_percent_of_the_eager_ones_memory(width: int, vocabulary: int) -> None:
    """Llama, 8 layers, d = width, 16 pairs, fp32, NPO: forward, backward and SGD; theirs without SGD.

    Both hold a second model; a cached reference needs less.
    """
    if available() < 8:
        pytest.skip("the eager step needs 6 GiB")
    assert peak("live", width, vocabulary) <= 0.45 * peak("eager", width, vocabulary)
