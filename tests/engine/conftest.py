"""What tests of several files start from."""

from pathlib import Path

import pytest
from helpers import saved_llama


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    return saved_llama(tmp_path / "model")
