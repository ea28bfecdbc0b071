"""The implementations of a pass, each in turn."""

import pytest
import torch

from efface_kernels import triton_launch


@pytest.fixture(params=["torch", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
        if not triton_launch.INTERPRETED:
            pytest.skip("these tensors are on the CPU, where Triton runs under TRITON_INTERPRET=1 alone")
        values = getattr(request.node, "callspec", None)
        if "bf16" in request.node.name or (values and torch.bfloat16 in values.params.values()):
            pytest.skip("bf16 is for a GPU: Triton's interpreter rounds it wrongly")
    return request.param
