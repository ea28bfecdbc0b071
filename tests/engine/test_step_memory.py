"""What a training step needs above the model, against the padded eager step with its second model."""

import subprocess
import sys
from pathlib import Path

import pytest


def peak(kind: str) -> float:
    """MiB above the model, measured in a process of its own."""
    script = Path(__file__).with_name("step_memory.py")
    done = subprocess.run([sys.executable, script, kind], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="resident sizes are Linux's")
def test_a_step_needs_at_most_45_percent_of_the_eager_ones_memory() -> None:
    """Llama, 8 layers, d = 512, V = 128256, 16 pairs, fp32, NPO: forward, backward and SGD; theirs without SGD.

    Both hold a second model; a cached reference needs less.
    """
    assert peak("live") <= 0.45 * peak("eager")
