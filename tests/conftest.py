"""Fixtures: the shared data folder, a tiny tokenizer, tiny models."""

import gc
import os
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
import torch

# Triton reads this when it is imported: without a GPU its kernels run in the interpreter. bf16 is wrong there.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Nothing here may reach the network; a missing local file must fail at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Of fixtures that several tests share; each test has its own, see ``_apart``.
_cache = tempfile.TemporaryDirectory(prefix="efface-tests-")
os.environ["EFFACE_CACHE"] = _cache.name

with suppress(ImportError):  # a machine that runs the GPU tests alone need not have it
    from hypothesis import HealthCheck, settings

    # The same examples every time, however slow the machine: the fuzzers of `make fuzz` look for new ones.
    settings.register_profile(
        "efface", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("efface")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a GPU is skipped before anything is set up for it."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish() -> None:
    """Every training run ends with a collection of garbage, of which what is imported and collected by now is none."""
    gc.collect()
    gc.freeze()


_collections = [0]


def pytest_runtest_logfinish() -> None:
    """Freeze what tests have imported since: a collection looks through 100 000 objects in 0.08 s."""
    now = gc.get_stats()[2]["collections"]
    if now != _collections[0] and len(gc.get_objects(2)) > 20_000:
        gc.collect()
        gc.freeze()
        now = gc.get_stats()[2]["collections"]
    _collections[0] = now


@pytest.fixture(autouse=True)
def _apart(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test draws the same numbers alone and among others, today and tomorrow, and leaves the user's cache alone."""
    number = zlib.crc32(request.node.name.encode())
    torch.manual_seed(number)
    # transformers 4 leaves the mixed precision of one run in the environment of the next
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    # most tests neither have a folder nor cache anything: one that nobody makes costs nothing
    folder = Path(tmp_path_factory.getbasetemp(), f"no-{number}")
    if "tmp_path" in request.fixturenames:
        folder = request.getfixturevalue("tmp_path")
    monkeypatch.setenv("EFFACE_CACHE", str(folder / "efface-cache"))


@pytest.fixture(scope="session")
def tofu() -> Path:
    """The real TOFU files."""
    if not (SHARED / "tofu" / "full.json").is_file():
        pytest.skip("needs ../shared/tofu, the TOFU data set beside the checkout")
    return SHARED / "tofu"


@pytest.fixture(scope="session")
def tofu_eval_logs() -> Path:
    """Real evaluation logs of Llama-2-7B models."""
    if not (SHARED / "tofu_eval_logs").is_dir():
        pytest.skip("needs ../shared/tofu_eval_logs, real evaluation logs beside the checkout")
    return SHARED / "tofu_eval_logs"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    from support.helpers import saved_llama  # needs datasets, which a machine that runs the GPU tests alone has not

    return saved_llama(tmp_path / "model")
