"""Tests of the choice of a backend: "auto" selects Triton on a device only if it agrees with torch there."""

from typing import Any

import pytest
import torch
from torch import Tensor

from efface_kernels import backends, resolve_backend, triton_launch

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_known", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # −∞ − −∞ in masked lanes, computed by NumPy
def test_the_passes_agree_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    if not triton_launch.INTERPRETED:
        pytest.skip("the tensors are on the CPU, where Triton runs only with TRITON_INTERPRET=1")
    assert backends.disagreement(torch.device("cpu"), (torch.float16, torch.float32), vocabulary=9001) is None


@pytest.mark.gpu
def test_the_passes_agree_on_a_gpu() -> None:
    assert backends.disagreement(torch.device("cuda", torch.cuda.current_device())) is None


def _torch_in_place_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("row_pass", "sequence_loss", "distribution_pass", "scale_pass"):
        monkeypatch.setattr(backends, f"{name}_triton", getattr(backends, f"{name}_torch"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("row_pass", "log-probabilities"),
        ("sequence_loss", "the sequence loss"),
        ("distribution_pass", "divergence"),
        ("scale_pass", "the scale pass"),
    ],
)
def test_each_pass_is_compared(monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    _torch_in_place_of_triton(monkeypatch)
    device, right = torch.device("cpu"), getattr(backends, f"{name}_torch")
    assert backends.disagreement(device, vocabulary=101) is None

    def wrong(*arguments: Any) -> Any:
        out = right(*arguments)
        first = out if isinstance(out, Tensor) else out[0]
        first[-1] += 1e-1
        return out

    monkeypatch.setattr(backends, f"{name}_triton", wrong)
    fault = backends.disagreement(device, vocabulary=101)
    assert fault is not None
    assert said in fault

    def refused(*arguments: Any) -> Any:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(backends, f"{name}_triton", refused)
    assert "PassManager::run failed" in str(backends.disagreement(device, vocabulary=101))


def test_what_agrees_is_used_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(backends, "disagreement", asked.append)
    monkeypatch.setattr(triton_launch, "IMPORTABLE", True)
    assert [resolve_backend("auto", GPU) for _ in range(2)] == ["triton"] * 2
    assert asked == [GPU]
    assert resolve_backend("torch", GPU) == "torch"


def test_what_differs_is_left_alone_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "disagreement", lambda _: "the row pass differs")
    monkeypatch.setattr(triton_launch, "IMPORTABLE", True)
    with pytest.warns(UserWarning, match="not used on cuda:0: the row pass differs"):
        assert resolve_backend("auto", GPU) == "torch"
    assert resolve_backend("auto", GPU) == "torch"


def test_a_full_or_a_capturing_device_is_asked_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: torch.device) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(triton_launch, "IMPORTABLE", True)
    monkeypatch.setattr(backends, "disagreement", full)
    assert resolve_backend("auto", GPU) == "torch"
    monkeypatch.setattr(backends, "disagreement", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert resolve_backend("auto", GPU) == "torch"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert resolve_backend("auto", GPU) == "triton"


def test_without_triton_a_gpu_gets_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "IMPORTABLE", False)
    assert resolve_backend("auto", GPU) == "torch"
