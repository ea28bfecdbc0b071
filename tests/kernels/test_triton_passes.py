"""Tests of the Triton passes in the interpreter that the shared tests leave out: fp32, fp16, fp64; bf16 needs a GPU."""

import itertools
import mmap

import pytest
import torch
from torch import Tensor

from efface_kernels import Logits, distribution_pass, passes, row_pass, triton_launch
from efface_kernels.distribution_pass.launch import launch_config as distribution_config
from efface_kernels.row_pass.launch import launch_config, row_pass_triton
from efface_kernels.triton_launch import LaunchConfig

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(not triton_launch.INTERPRETED, reason="needs TRITON_INTERPRET=1"),
    # NumPy warns of −inf − −inf in lanes that the interpreted kernels mask afterwards
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

DTYPES = [torch.float64, torch.float32, torch.float16]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def gold(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return ℓ and softmax − onehot of fp64 rows, implemented independently."""
    z = logits.double() - logits.double().amax(1, keepdim=True)
    total = z.exp().sum(1, keepdim=True)
    rows = torch.arange(len(targets))
    logprobs = z[rows, targets] - total[:, 0].log()
    p = z.exp() / total
    p[rows, targets] = torch.expm1(logprobs)
    return logprobs, p


# In every dtype, a part of a block, whole blocks, and both; in some of them the sums over a real vocabulary.
ROWS = [
    *((rows, v, dtype) for rows, v in [(0, 9), (1, 1), (3, 7), (2, 4096), (2, 4097)] for dtype in DTYPES),
    *((2, 50257, dtype) for dtype in (torch.float64, torch.float16)),
    (2, 51200, torch.float32),
    *((2, 128256, dtype) for dtype in (torch.float32, torch.float16)),
]


@pytest.mark.parametrize(("rows", "vocabulary", "dtype"), ROWS, ids=str)
def test_no_further_from_fp64_than_torch(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(rows, vocabulary) * 3).to(dtype)
    targets = torch.randint(vocabulary, (rows,))
    targets[-1:] = vocabulary - 1
    logprobs, gradient = gold(logits, targets)
    eager, torch_gradient = logits.clone(), logits.clone()
    eager_logprobs = row_pass(torch_gradient, targets, backend="torch").logprobs
    reference = eager[: max(0, rows - 1)]
    out = row_pass(logits, targets, reference_logits=reference, backend="triton")
    assert out.reference_logprobs is not None
    if not rows:
        assert out.logprobs.shape == out.reference_logprobs.shape == (0,)
        return
    assert torch.equal(out.reference_logprobs, out.logprobs[:-1])
    eps = torch.finfo(out.logprobs.dtype).eps
    assert rms(out.logprobs - logprobs) <= 2 * rms(eager_logprobs - logprobs) + 2 * eps * rms(logprobs)
    eps = torch.finfo(dtype).eps
    assert rms(logits - gradient) <= 2 * rms(torch_gradient - gradient) + 2 * eps * rms(gradient)


def distributions(logits: Tensor, reference: Tensor) -> tuple[Tensor, ...]:
    """Return KL(q‖p), the entropy of q, q and p of fp64 rows, implemented independently."""
    log_p, log_q = torch.log_softmax(logits.double(), 1), torch.log_softmax(reference.double(), 1)
    q = log_q.exp()
    return (q * (log_q - log_p)).nansum(1), torch.special.entr(q).sum(1), q, log_p.exp()


@pytest.mark.parametrize(
    ("rows", "vocabulary", "dtype", "over"),
    [
        *((*each, over) for each in ROWS if each[1] < 50257 and each[1] != 4096 for over in (False, True)),
        (2, 50257, torch.float64, True),
        (2, 50257, torch.float32, False),
        (2, 128256, torch.float32, True),
        (2, 128256, torch.float16, False),
    ],
    ids=str,
)
def test_distributions_no_further_from_fp64_than_torch(
    rows: int, vocabulary: int, dtype: torch.dtype, over: bool
) -> None:
    """Close models, as in a run: p − q is about p / 100, and −inf pads both vocabularies."""
    logits = torch.randn(rows, vocabulary).to(dtype) * 3
    reference = (logits.double() + torch.randn(rows, vocabulary) / 64).to(dtype)
    if vocabulary > 9:
        logits[:, -7:] = reference[:, -7:] = float("-inf")
        logits[:1, 5] = reference[:1, 5] = 40.0  # memorised: q of the other classes is e^-30
    targets = torch.randint(vocabulary, (rows,))
    divergence, entropy, q, p = distributions(logits, reference)
    # The accuracy of KL is limited by the last place of q log q, and that of p − q by the last place of p.
    golds = (divergence, entropy), (entropy, entropy), (p - q, p)
    results = {}
    for backend in ("torch", "triton"):
        z, zr = logits.clone(), reference.clone()
        out = zr if over else None
        results[backend] = (*distribution_pass(z, zr, targets, out=out, backend=backend), zr if over else z)
    for ours, eager, (exact, terms) in zip(results["triton"], results["torch"], golds, strict=True):
        assert ours.isfinite().all()
        # the fp64 reference is no better: a sum of V rounded exponentials, which differ between processors
        eps, places = torch.finfo(ours.dtype).eps, max(128, vocabulary**0.5) if dtype == torch.float64 else 2
        if rows:
            assert rms(ours - exact) <= 2 * rms(eager - exact) + places * eps * rms(terms)


@pytest.mark.parametrize("vocabulary", [7, 2048, 5003])
def test_half_precision_over_fp32_logits(vocabulary: int) -> None:
    """2-byte entries overwrite 4-byte ones: a row of P ends in the middle of the reference's row."""
    logits, reference = torch.randn(2, 3, vocabulary)
    targets, apart = torch.randint(vocabulary, (3,)), torch.empty(3, vocabulary).half()
    expected = distribution_pass(logits, reference, targets, out=apart, backend="triton")
    padded = torch.full((3, vocabulary + 5), torch.nan)[:, :vocabulary].copy_(reference)
    over = padded.view(torch.float16)[:, :vocabulary]
    got = distribution_pass(logits, padded, targets, out=over, backend="triton")
    assert torch.equal(over, apart)
    assert torch.equal(got.divergence, expected.divergence)
    assert torch.equal(got.entropy, expected.entropy)


@pytest.mark.parametrize("softcap", [3.0, 30.0])
@pytest.mark.parametrize("scale", [0.3, 10.0, 200.0])
def test_softcapped_logits_are_right_to_the_caps_last_place(scale: float, softcap: float) -> None:
    """tanh is computed from one exponential: relative accuracy is lost near 0, absolute accuracy is not."""
    logits, targets = scale * torch.randn(3, 5003), torch.randint(5003, (3,))
    z = logits.double().requires_grad_()
    expected = torch.log_softmax(softcap * torch.tanh(z / softcap), 1).gather(1, targets[:, None])[:, 0]
    (slope,) = torch.autograd.grad(-expected.sum(), z)
    out = row_pass(logits, targets, softcap=softcap, backend="triton")
    eps = torch.finfo(torch.float32).eps
    assert (out.logprobs - expected).abs().max() <= 4 * eps * (softcap + expected.abs().max())
    assert rms(logits - slope) <= 4 * eps * (1 + softcap) * rms(slope)


def test_derivative_equals_finite_differences() -> None:
    z, targets, step = torch.randn(2, 5, dtype=torch.float64), torch.tensor([4, 0]), 1e-6
    derivative = z.clone()
    row_pass(derivative, targets, softcap=3.0, backend="triton")
    for i in range(5):
        up, down = z.clone(), z.clone()
        up[:, i] += step
        down[:, i] -= step
        difference = [row_pass(x, targets, softcap=3.0, gradient=False, backend="triton").logprobs for x in (up, down)]
        torch.testing.assert_close(-(difference[0] - difference[1]) / (2 * step), derivative[:, i], rtol=0, atol=1e-8)


@pytest.mark.parametrize("rows", [2, 3])
def test_offsets_beyond_int32(rows: int) -> None:
    """Rows that are 2^31 entries apart, in a mapping whose untouched pages use no memory."""
    stride, vocabulary = 2**31 - 16, 40
    size = ((rows - 1) * stride + vocabulary) * 4
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    with mmap.mmap(-1, size, flags=flags) as memory:
        flat = torch.frombuffer(memory, dtype=torch.float32)
        far = flat.as_strided((rows, vocabulary), (stride, 1))
        near = torch.randn(rows, vocabulary)
        far.copy_(near)
        targets = torch.randint(vocabulary, (rows,))
        expected = row_pass(near, targets, backend="triton").logprobs
        assert torch.equal(row_pass(far, targets, backend="triton").logprobs, expected)
        assert torch.equal(far, near)
        far.copy_(torch.randn(rows, vocabulary))
        near = far.clone()
        expected = distribution_pass(near, near.clone(), targets, shift=2.0, backend="triton").divergence
        assert torch.equal(
            distribution_pass(far, far.clone(), targets, shift=2.0, backend="triton").divergence, expected
        )
        assert torch.equal(far, near)
        del flat, far


@pytest.mark.parametrize("backend", ["row", "distribution"])
def test_rows_repeat_bit_for_bit_whatever_their_neighbours(backend: str) -> None:
    logits, other, targets = torch.randn(5, 5003), torch.randn(5, 5003), torch.randint(5003, (5,))

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        z = logits[rows].clone()
        if backend == "row":
            return z, row_pass(z, targets[rows], backend="triton").logprobs
        return z, distribution_pass(z, other[rows], targets[rows], backend="triton").divergence

    whole, again, part = run(slice(0, 5)), run(slice(0, 5)), run(slice(3, 4))
    for first, second, third in zip(whole, again, part, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[3:4], third)


def test_huge_padded_and_memorised_rows() -> None:
    """Logits of 1e4 overflow e^z, −inf fills whole blocks, and ℓ ≈ −1e-4 is lost in z_y − logsumexp."""
    logits = torch.full((2, 9000), float("-inf"))
    logits[:, :50] = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)) + 1e4
    logits[1, 3] = 1e4 + 14
    targets = torch.tensor([7, 3])
    logprobs, gradient = gold(logits, targets)
    out = row_pass(logits, targets, backend="triton")
    # Σ e^(z − max) is 1 + 4e-5, and its last place, 1.2e-7, is 3e-3 of ℓ. z_y − logsumexp would be wrong by 20 times ℓ.
    torch.testing.assert_close(out.logprobs.double(), logprobs, rtol=6e-3, atol=0)
    torch.testing.assert_close(logits.double(), gradient, rtol=6e-3, atol=1e-12)


def test_fp16_target_entry_is_formed_before_rounding() -> None:
    logits = torch.zeros(1, 4).half()
    logits[0, 1] = 12.0  # p_y − 1 = −1.8e-5; the largest fp16 below 1 is 1 − 4.9e-4
    _, gradient = gold(logits, torch.tensor([1]))
    row_pass(logits, torch.tensor([1]), backend="triton")
    torch.testing.assert_close(logits[0, 1].double(), gradient[0, 1], rtol=4e-3, atol=0)


def test_targets_out_of_range_make_their_row_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the targets are not checked before the launch."""
    monkeypatch.setattr(passes, "check_targets", lambda *_: None)
    targets = torch.tensor([0, -100, 5, 4])
    logits = torch.randn(4, 5)
    out = row_pass(logits, targets, reference_logits=torch.randn(4, 6), backend="triton")
    assert out.reference_logprobs is not None
    assert out.logprobs.isnan().tolist() == [False, True, True, False]
    assert out.reference_logprobs.isnan().tolist() == [False, True, False, False]
    assert logits.isnan().all(1).tolist() == [False, True, True, False]
    assert logits[[0, 3]].isfinite().all()
    logits = torch.randn(4, 5)
    pair = distribution_pass(logits, torch.randn(4, 5), targets, shift=1.0, backend="triton")
    assert pair.divergence.isnan().tolist() == [False, True, True, False]
    assert logits.isnan().all(1).tolist() == [False, True, True, False]


def test_backend_is_refused_on_the_cpu_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(1, 2), torch.zeros(1, dtype=torch.int64)
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="got tensors on cpu"):
        row_pass(logits, targets, backend="triton")
    monkeypatch.setattr(triton_launch, "IMPORTABLE", False)
    with pytest.raises(ValueError, match="install triton"):
        row_pass(logits, targets, backend="triton")


@pytest.mark.parametrize("vocabulary", [1, 7, 50257, 128256])
def test_launch_configuration(vocabulary: int) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        configs = [
            launch_config(vocabulary, dtype),
            launch_config(vocabulary, dtype, persistent=True),
            distribution_config(vocabulary, dtype, torch.float32),
        ]
        for config in configs:
            assert config.block & (config.block - 1) == 0
            assert config.num_warps in (1, 2, 4, 8, 16, 32)
            assert config.block >= 16 // dtype.itemsize
    assert launch_config(128256, torch.bfloat16).block == 4096
    assert launch_config(128256, torch.bfloat16, torch.float32).block == 2048
    assert launch_config(50257, torch.bfloat16).block == 2048  # one load per thread, not two
    assert launch_config(128256, torch.bfloat16, warp_size=64).num_warps == 4
    assert launch_config(128256, torch.bfloat16, persistent=True) == LaunchConfig(16384, 32, resident=1, hold=True)
    assert distribution_config(128256, torch.float32, torch.float32) == LaunchConfig(2048, 8)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5])
def test_persistent_programs_take_all_rows_and_change_no_bit(rows: int) -> None:
    """The interpreter runs two programs."""
    logits, frozen = torch.randn(rows, 5003), torch.randn(max(0, rows - 2), 5003)
    targets = torch.randint(5003, (rows,))
    results = []
    for resident, hold in itertools.product((0, 1), (False, True)):
        z, config = logits.clone(), LaunchConfig(1024, 4, resident, hold)
        results.append((z, *row_pass_triton(Logits(z), targets, Logits(frozen), True, config)))
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)
    assert LaunchConfig(1024, 4, resident=1).programs(7, torch.device("cpu")) == 2
    assert LaunchConfig(1024, 4).programs(7, torch.device("cpu")) == 7
