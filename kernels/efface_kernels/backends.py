"""Selection of the backend that runs a pass, and the self-test of the Triton passes that "auto" relies on."""

import functools
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from efface_kernels import native, triton_launch
from efface_kernels.distribution_pass.launch import distribution_pass_triton
from efface_kernels.distribution_pass.reference import distribution_pass_torch
from efface_kernels.logits import Logits
from efface_kernels.memory import aligned
from efface_kernels.row_pass.launch import row_pass_triton
from efface_kernels.row_pass.reference import row_pass_torch
from efface_kernels.scale_pass.launch import scale_pass_triton
from efface_kernels.scale_pass.reference import scale_pass_torch
from efface_kernels.sequence_loss.kinds import Kind
from efface_kernels.sequence_loss.launch import sequence_loss_triton
from efface_kernels.sequence_loss.rule import SequenceRule, Term, sequence_loss_torch
from efface_kernels.sequences import Sequences

BACKENDS = ("auto", "triton", "native", "torch")

_VOCABULARY = 50257  # several blocks for every launch configuration, and a partial last block
_ROWS = 6
_LENGTHS = (2, 1, 3)

_known: dict[torch.device, bool] = {}


def resolve_backend(backend: str, device: torch.device) -> str:
    """Return the backend that ``backend`` selects on ``device``: ``"triton"``, ``"native"`` or ``"torch"``.

    On the CPU, "auto" selects "native", or "torch" if the extension cannot be imported. On GPUs it selects "triton" if
    the Triton passes agreed with the torch passes on first use (``agrees``). Otherwise it selects "torch". A fallback
    is reported by one warning.

    Raises:
        ValueError: if the name is unknown, or this build or device does not support the backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"`backend`: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "triton":
        _check_triton(device)
        return "triton"
    if backend == "auto" and device.type in triton_launch.DEVICES and triton_launch.IMPORTABLE:
        return "triton" if agrees(device) else "torch"
    if backend == "torch" or (backend == "auto" and device.type != "cpu"):
        return "torch"
    if device.type != "cpu":
        raise ValueError(f"`backend`: 'native' runs on CPU tensors, got tensors on {device}; use 'auto' or 'torch'")
    if native.IMPORT_ERROR is None:
        return "native"
    if backend == "native":
        raise ValueError(
            f"`backend`: 'native' needs efface_native, which cannot be imported ({native.IMPORT_ERROR}); reinstall "
            "efface with a C++20 compiler installed, or use 'torch'"
        )
    _warn_missing_extension()
    return "torch"


def _check_triton(device: torch.device) -> None:
    if not triton_launch.IMPORTABLE:
        raise ValueError(
            "`backend`: 'triton' needs the package triton, which is not installed; install triton, or use 'auto', "
            "'native' or 'torch'"
        )
    runs = device.type in triton_launch.DEVICES or (device.type == "cpu" and triton_launch.INTERPRETED)
    if not runs:
        raise ValueError(
            f"`backend`: expected tensors on a CUDA, ROCm or XPU device for 'triton', got tensors on {device}; use "
            "'auto', 'native' or 'torch' (to debug a kernel on the CPU, set TRITON_INTERPRET=1 before Python starts)"
        )


@functools.cache
def _warn_missing_extension() -> None:
    warnings.warn(
        f"the extension efface_native cannot be imported ({native.IMPORT_ERROR}); the loss runs on plain torch, which "
        "is slower. Reinstall efface with a C++20 compiler installed.",
        stacklevel=5,
    )


def agrees(device: torch.device) -> bool:
    """Return whether the Triton passes agree with the torch passes on ``device``; warn if they do not.

    The test runs once per device and its result is kept. While a CUDA graph is captured, or if the device is out of
    memory, the function returns False and keeps no result.
    """
    if device not in _known:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        try:
            fault = disagreement(device)
        except torch.OutOfMemoryError:
            return False
        if fault is not None:
            warnings.warn(
                f"the Triton passes are not used on {device}: {fault}; the loss runs on plain torch, which is slower. "
                "Please report this with the versions of torch, triton and the driver.",
                stacklevel=4,
            )
        _known[device] = fault is None
    return _known[device]


def disagreement(
    device: torch.device, dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32), vocabulary: int = _VOCABULARY
) -> str | None:
    """Return a description of the first difference between the Triton and the torch passes, or None if they agree.

    Takes a few milliseconds in addition to the compilation of the kernels.
    """
    try:
        for dtype in dtypes:
            for name, ours, theirs in _results(device, dtype, vocabulary):
                # One ulp of the stored dtype: the passes sum in different orders, so their roundings can differ.
                rtol = max(torch.finfo(ours.dtype).eps, 1e-5)
                if not torch.allclose(ours.float(), theirs.float(), rtol=rtol, atol=1e-5):
                    worst = (ours.float() - theirs.float()).abs().max().item()
                    return f"{name} in {dtype} differs from torch by up to {worst:.3g}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - Triton's compiler and the driver raise exceptions of many types
        return f"{type(error).__name__}: {error}"
    return None


def _results(device: torch.device, dtype: torch.dtype, vocabulary: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield each result of the passes: its name, the value from Triton and the value from torch."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(rows: int, dtype: torch.dtype = dtype) -> Tensor:
        return padded(3 * torch.randn(rows, vocabulary, generator=generator, device="cpu").to(dtype))

    def padded(values: Tensor) -> Tensor:  # strided as in the loop: kernels are specialised on the stride
        return aligned(len(values), vocabulary, values.dtype, device).copy_(values)

    logits = random(_ROWS)
    frozen = padded(logits + random(_ROWS) / 32)[: -_LENGTHS[-1]]  # a model close to the policy
    targets = torch.randint(vocabulary, (_ROWS,), generator=generator, device="cpu")
    logits[0, targets[0]] = 30.0  # a memorised target, p ≈ 1
    targets = targets.to(device)
    policies = logits, logits.clone()
    rows = [
        run(Logits(policy), targets, Logits(frozen), True)
        for run, policy in zip((row_pass_triton, row_pass_torch), policies, strict=True)
    ]
    names = ("the row pass's log-probabilities", "the row pass's reference log-probabilities")
    yield from zip(names, *rows, strict=True)
    yield "the row pass's derivative", *policies

    roles = torch.arange(len(_LENGTHS), dtype=torch.int8, device=device)
    kinds = Term(Kind.NPO, beta=0.1), Term(Kind.SIMNPO, beta=2.5), Term(Kind.NLL)
    rule = SequenceRule.of(roles, dict(enumerate(kinds)))
    offsets = torch.tensor([0, *_LENGTHS], device=device).cumsum(0)
    logprobs, reference = rows[1]
    triton, plain = (
        run(Sequences(logprobs, offsets), rule, reference) for run in (sequence_loss_triton, sequence_loss_torch)
    )
    yield "the sequence loss", triton.terms, plain.terms
    yield "the sequence loss's derivative", triton.coefficients, plain.coefficients

    factor, wide = torch.tensor(1 / 3).to(device), random(_ROWS, torch.float32)
    for name, values, keep in (("", wide, False), (" in place", wide.to(dtype), False), (" of a kept one", wide, True)):
        triton_scaled, plain_scaled = (
            run(values.clone(), factor, dtype, keep) for run in (scale_pass_triton, scale_pass_torch)
        )
        yield f"the scale pass{name}", triton_scaled, plain_scaled

    # As in the loop: fp32 logits for every dtype; a half-precision derivative overwrites the reference's logits.
    first, second = (random(_ROWS, torch.float32) for _ in range(2))
    divergences, derivatives = [], []
    for run in (distribution_pass_triton, distribution_pass_torch):
        policy, other = padded(first), padded(second)
        into = policy if dtype == torch.float32 else other.view(dtype)[:, :vocabulary]
        divergences.append(run(Logits(policy), Logits(other), targets, 0.0, into))
        derivatives.append(into)
    yield from zip(("the divergence", "the entropy"), *divergences, strict=True)
    yield "the divergence's derivative", derivatives[0], derivatives[1]
