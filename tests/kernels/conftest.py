"""Fixtures that run a test with each kernel backend that this machine supports."""

from collections.abc import Iterator

import pytest
import torch

from efface_kernels import triton_launch


def on_gpu(name: str) -> object:
    """Return a parameter for a test that creates its tensors on a GPU."""
    return pytest.param(f"{name} on a GPU", marks=pytest.mark.gpu)


def run_on(request: pytest.FixtureRequest, what: str) -> Iterator[str]:
    """Yield the backend's name. For "... on a GPU", CUDA is the default device meanwhile."""
    name, _, gpu = what.partition(" on ")
    if name == "triton":
        pytest.importorskip("triton")
    if gpu:
        with torch.device("cuda"):
            yield name
        return
    if name == "triton":
        if not triton_launch.INTERPRETED:
            pytest.skip("the tensors are on the CPU, where Triton runs only with TRITON_INTERPRET=1")
        values = getattr(request.node, "callspec", None)
        if "bf16" in request.node.name or (values and torch.bfloat16 in values.params.values()):
            pytest.skip("bf16 needs a GPU: Triton's interpreter rounds it wrongly")
    yield name


@pytest.fixture(params=["torch", "native", "triton", on_gpu("torch"), on_gpu("triton")])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from run_on(request, request.param)


@pytest.fixture(params=["triton", on_gpu("triton")])
def triton_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from run_on(request, request.param)
