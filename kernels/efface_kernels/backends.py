"""The choice of a pass's implementation, and the self-test of the Triton passes that "auto" asks for."""

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

_VOCABULARY = 50257  # several blocks of every configuration, and a ragged end
_ROWS = 6
_LENGTHS = (2, 1, 3)

_known: dict[torch.device, bool] = {}


def resolve_backend(backend: str, device: torch.device) -> str:
    """Return the implementation, ``"triton"``, ``"native"`` or ``"torch"``, that ``backend`` names on ``device``.

    "auto" is native on the CPU, or torch where the extension is missing; Triton on GPUs, where on its first use it gave
    what torch gives (``agrees``); torch elsewhere. What falls back says so in one warning.

    Raises:
        ValueError: an unknown name, or a backend that this build or device does not have.
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
        raise ValueError(f"`backend`: 'native' runs on the CPU, got tensors on {device}; use 'auto' or 'torch'")
    if native.IMPORT_ERROR is None:
        return "native"
    if backend == "native":
        raise ValueError(
            f"`backend`: the extension efface_native cannot be imported ({native.IMPORT_ERROR}); reinstall efface "
            "with a C++20 compiler at hand, or use 'torch'"
        )
    _warn_missing_extension()
    return "torch"


def _check_triton(device: torch.device) -> None:
    if not triton_launch.IMPORTABLE:
        raise ValueError("`backend`: 'triton' is not installed; install triton, or use 'auto', 'native' or 'torch'")
    runs = device.type in triton_launch.DEVICES or (device.type == "cpu" and triton_launch.INTERPRETED)
    if not runs:
        raise ValueError(
            f"`backend`: 'triton' runs on CUDA, ROCm and XPU devices, got tensors on {device}; use 'auto', 'native' or "
            "'torch' (or set TRITON_INTERPRET=1 before Python starts, to debug a kernel on the CPU)"
        )


@functools.cache
def _warn_missing_extension() -> None:
    warnings.warn(
        f"the extension efface_native cannot be imported ({native.IMPORT_ERROR}); the loss runs on plain torch, "
        "more slowly. Reinstall efface with a C++20 compiler at hand.",
        stacklevel=5,
    )


def agrees(device: torch.device) -> bool:
    """Whether the Triton passes give on ``device`` what the torch passes give; found out once, and warned about if not.

    False, without an answer for later, while a CUDA graph is captured or where the device is out of memory.
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
                f"the Triton passes are not used on {device}: {fault}; the loss runs on plain torch, more slowly. "
                "Please report this with the versions of torch, triton and the driver.",
                stacklevel=4,
            )
        _known[device] = fault is None
    return _known[device]


def disagreement(
    device: torch.device, dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32), vocabulary: int = _VOCABULARY
) -> str | None:
    """Return what differs, None where nothing does. Some milliseconds, and the compilation of the kernels."""
    try:
        for dtype in dtypes:
            for name, ours, theirs in _results(device, dtype, vocabulary):
                # An ulp of the stored dtype: the passes add up in another order, and one of them may round up.
                rtol = max(torch.finfo(ours.dtype).eps, 1e-5)
                if not torch.allclose(ours.float(), theirs.float(), rtol=rtol, atol=1e-5):
                    worst = (ours.float() - theirs.float()).abs().max().item()
                    return f"{name} in {dtype} differs from torch by up to {worst:.3g}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever Triton's compiler and the driver raise
        return f"{type(error).__name__}: {error}"
    return None


def _results(device: torch.device, dtype: torch.dtype, vocabulary: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield each result of a pass, by Triton and by torch."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(rows: int, dtype: torch.dtype = dtype) -> Tensor:
        return padded(3 * torch.randn(rows, vocabulary, generator=generator, device="cpu").to(dtype))

    def padded(values: Tensor) -> Tensor:  # as the loop's: kernels are compiled for what is known of a stride
        return aligned(len(values), vocabulary, values.dtype, device).copy_(values)

    logits = random(_ROWS)
    frozen = padded(logits + random(_ROWS) / 32)[: -_LENGTHS[-1]]  # another model, not another language
    targets = torch.randint(vocabulary, (_ROWS,), generator=generator, device="cpu")
    logits[0, targets[0]] = 30.0  # memorised
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

    # As the loop's: fp32 logits whatever the dtype, and a derivative in half precision over the reference's.
    first, second = (random(_ROWS, torch.float32) for _ in range(2))
    divergences, derivatives = [], []
    for run in (distribution_pass_triton, distribution_pass_torch):
        policy, other = padded(first), padded(second)
        into = policy if dtype == torch.float32 else other.view(dtype)[:, :vocabulary]
        divergences.append(run(Logits(policy), Logits(other), targets, 0.0, into))
        derivatives.append(into)
    yield from zip(("the divergence", "the entropy"), *divergences, strict=True)
    yield "the divergence's derivative", derivatives[0], derivatives[1]
