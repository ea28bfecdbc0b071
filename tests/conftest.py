"""Shared fixtures (the data folder, a saved checkpoint), seeding and an isolated cache for every test."""

import gc
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

# Triton reads this variable when it is imported. Without a GPU its kernels run in the interpreter, where bf16 is wrong.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests must not use the network; a missing local file must fail at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The cache folder for fixtures that several tests share. Each test has its own, see ``_apart``.
_cache = tempfile.TemporaryDirectory(prefix="efface-tests-")
os.environ["EFFACE_CACHE"] = _cache.name

with suppress(ImportError):  # a machine that runs only the GPU tests need not have hypothesis
    from hypothesis import HealthCheck, settings

    # The same examples every time, and no deadline on slow machines. The fuzzers of `make fuzz` search for new ones.
    settings.register_profile(
        "efface", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("efface")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU before their fixtures are set up."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish() -> None:
    """Exclude the objects that exist by now from the garbage collection that ends every training run."""
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
    """Seed each test by its name, so that it is reproducible alone and in any order, and isolate the user's cache."""
    number = zlib.crc32(request.node.name.encode())
    torch.manual_seed(number)
    # transformers 4 leaves the mixed precision of one run in the environment of the next
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    # a path that does not exist yet: most tests cache nothing, so no folder is created for them
    folder = Path(tmp_path_factory.getbasetemp(), f"no-{number}")
    if "tmp_path" in request.fixturenames:
        folder = request.getfixturevalue("tmp_path")
    monkeypatch.setenv("EFFACE_CACHE", str(folder / "efface-cache"))


@pytest.fixture(scope="session")
def tofu() -> Path:
    """The folder with the real TOFU files."""
    if not (SHARED / "tofu" / "full.json").is_file():
        pytest.skip("needs the TOFU data set in ../shared/tofu, next to the checkout")
    return SHARED / "tofu"


@pytest.fixture(scope="session")
def tofu_eval_logs() -> Path:
    """The folder with real evaluation logs of Llama-2-7B models."""
    if not (SHARED / "tofu_eval_logs").is_dir():
        pytest.skip("needs real evaluation logs in ../shared/tofu_eval_logs, next to the checkout")
    return SHARED / "tofu_eval_logs"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    from support.helpers import saved_llama  # needs datasets, which a machine for only the GPU tests may lack

    return saved_llama(tmp_path / "model")


@pytest.fixture
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # transformers configures accelerate through the environment, which must not affect the next test
    for name in ("BACKEND", "MODE"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    # Imported here, because importing the compiler takes seconds.
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
