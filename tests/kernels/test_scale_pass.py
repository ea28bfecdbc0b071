"""Tests of the scale pass: one rounding, in place or not, and no memory access if the factor is 1."""

import itertools

import pytest
import torch
from torch import Tensor

from efface_kernels import triton_launch
from efface_kernels.passes import scale_pass
from efface_kernels.scale_pass import launch

# NumPy warns of ∞ times a number in lanes that the interpreted kernel masks afterwards
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def factor_of(values: Tensor, factor: float) -> Tensor:
    return torch.tensor(factor, dtype=torch.float64 if values.dtype == torch.float64 else torch.float32)


SHAPES = ((0,), (1,), (7,), (2048,), (2, 2048), (3, 1025), (0, 5), (50257,))
FACTORS = (1.0, 1 / 3, 0.0, float("nan"), float("inf"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_equals_a_product(backend: str, dtype: torch.dtype) -> None:
    for shape, factor, keep in itertools.product(SHAPES, FACTORS, (False, True)):
        values, case = torch.randn(shape).to(dtype), f"{shape}, {factor=}, {keep=}"
        given, scalar = values.clone(), factor_of(values, factor)
        out = scale_pass(given, scalar, dtype=dtype, keep=keep, backend=backend)
        # in half precision, the product is computed in fp32 and rounded once; the factor is not rounded before
        expected = (values.to(scalar.dtype) * scalar).to(dtype)
        rtol = torch.finfo(dtype).eps if factor != 1 else 0
        torch.testing.assert_close(
            out, expected, rtol=rtol, atol=0, equal_nan=True, msg=lambda text, case=case: f"{case}: {text}"
        )
        assert (out is given) == (not keep), case
        assert not keep or torch.equal(given, values), case


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_sum_in_fp32_is_rounded_once(backend: str, dtype: torch.dtype, factor: float, keep: bool) -> None:
    values = torch.randn(3, 2049)
    out = scale_pass(values.clone(), factor_of(values, factor), dtype=dtype, keep=keep, backend=backend)
    assert torch.equal(out, (values * factor_of(values, factor)).to(dtype))


@pytest.mark.parametrize("strided", [torch.randn(6, 4).T, torch.randn(6, 4)[:, 0]], ids=["transposed", "column"])
def test_any_strides(backend: str, strided: Tensor) -> None:
    values = strided.to(torch.get_default_device())
    out = scale_pass(values.clone(), factor_of(values, 3.0), dtype=torch.float32, keep=False, backend=backend)
    torch.testing.assert_close(out, 3 * values)


def test_nothing_is_moved_where_the_factor_is_one(triton_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is not written, so that a concurrent write by other code would not be lost."""
    pytest.importorskip("triton")
    if not triton_launch.INTERPRETED:
        pytest.skip("counts the interpreter's accesses")
    from triton.runtime import interpreter

    stores, create = [], interpreter.InterpreterBuilder.create_masked_store
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_masked_store", lambda *given: stores.append(1) or create(*given)
    )
    values = torch.randn(5000)
    for factor, keep, moved in ((1.0, False, False), (2.0, False, True), (1.0, True, True)):
        stores.clear()
        scale_pass(values, factor_of(values, factor), dtype=torch.float32, keep=keep, backend=triton_backend)
        assert bool(stores) == moved


def test_more_entries_than_programs_take_in_one_step(triton_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_RESIDENT", 1)  # two programs in the interpreter
    values = torch.randn(2048 * 10 + 17)
    out = scale_pass(values.clone(), factor_of(values, 2.0), dtype=torch.float32, keep=False, backend=triton_backend)
    assert torch.equal(out, 2 * values)


def test_launch_configuration() -> None:
    config = launch.launch_config()
    assert (config.block, config.num_warps) == (2048, 8)
    assert launch.launch_config(64).num_warps == 4
    assert [config.programs(blocks, torch.device("cpu")) for blocks in (1, 16, 17, 128256)] == [1, 16, 16, 16]
