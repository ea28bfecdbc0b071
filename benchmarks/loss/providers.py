"""The providers of the loss suite: objectives at the head, forward and backward, by all implementations.

The file defines a provider and its construction from a cross entropy, then the bare products, efface, eager torch and
the other implementations.
"""

import math
import pkgutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from benchmarks.harness.shared import able, left_out
from benchmarks.loss.inputs import BETA, FLOOR, FUNCTIONS, KL, LENGTH, OBJECTIVES, LossInputs, LossShape
from efface_kernels import Head, ReferenceRows, linear_distribution_loss, linear_sequence_loss, segment_sums

Gradients: TypeAlias = tuple[Tensor, ...]  # of ``LossInputs.wanted``
Nll: TypeAlias = Callable[[Tensor, Head, Tensor], Tensor]  # hidden states (N, D), head, targets (N,) -> −ℓ
Wrapper: TypeAlias = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]

PRODUCTS = "bare GEMMs"
OURS = "efface"
EAGER = "eager"
COMPILED = f"{EAGER} + torch.compile"


@dataclass(frozen=True)
class LossProvider:
    """A way to compute an objective's gradients. ``gemms`` counts products of 2 N D V floating-point operations."""

    who: str
    mode: str  # a key of ``inputs.FLOOR``
    gemms: int
    computes: str
    run: Callable[[LossInputs], Gradients]  # its argument is ``LossInputs.of(mode)``

    @property
    def name(self) -> str:
        return f"{self.who}, {self.mode}"


Found: TypeAlias = tuple[list[LossProvider], list[str]]  # providers of a shape, and the reasons why others are missing


@dataclass(frozen=True)
class Rival:
    """Another implementation: an op for some objectives, and the op's limits.

    Attributes:
        name: prefix of the names of its providers.
        offer: function of the name, the shape and, if set, the imported op; returns the providers.
        objectives: objectives that it implements.
        op: "module:name"; the package can be missing. It is imported only for a shape that it supports.
        gpu: reason why it cannot run on a CPU; empty if it can.
        lacks: unsupported features, "bias" or "soft-cap".
    """

    name: str
    offer: Callable[..., Found]
    objectives: tuple[str, ...] = tuple(FUNCTIONS)
    op: str = ""
    gpu: str = ""
    lacks: tuple[str, ...] = ()

    def why_not(self, shape: LossShape) -> str | None:
        """Return the reason why it has no provider for a shape, or None if it has one."""
        wanted = {"bias": shape.bias, "soft-cap": shape.softcap is not None}
        if shape.device == "cpu" and self.gpu:
            return self.gpu
        if any(wanted[part] for part in self.lacks):
            return f"has no {self.lacks[0]}" if len(self.lacks) == 1 else f"has neither {' nor '.join(self.lacks)}"
        try:
            self._op()
        except Exception as error:  # noqa: BLE001 - an import can raise anything on an unknown machine
            return f"{type(error).__name__}: {error}"
        return None

    def providers(self, shape: LossShape) -> Found:
        """Return its providers for a shape, and the settings that are missing."""
        return self.offer(self.name, shape, *self._op())

    def _op(self) -> list[Any]:
        return [pkgutil.resolve_name(self.op)] if self.op else []


def gradients(loss: Tensor, inputs: LossInputs) -> Gradients:
    """Return the gradients of ``inputs.wanted``."""
    return torch.autograd.grad(loss, inputs.wanted)


def of_modes(
    who: str,
    again: int,
    computes: str,
    run: Callable[[LossInputs, str], Gradients],
    shape: LossShape,
    modes: Collection[str] | None = None,
) -> list[LossProvider]:
    """Return a provider for each mode of the shape, or for those in ``modes``.

    ``again`` is the number of products beyond the floor: 1 if the backward pass recomputes the logits.
    """

    def of(mode: str) -> LossProvider:
        return LossProvider(who, mode, FLOOR[mode] + again, computes, lambda inputs: run(inputs, mode))

    return [of(mode) for mode in shape.modes if modes is None or mode in modes]


def from_nll(who: str, again: int, computes: str, nll: Nll, shape: LossShape) -> list[LossProvider]:
    """Return providers for open-unlearning's form of the objectives, given ``nll``, which computes −ℓ of each row."""
    if shape.objective == KL:
        return []

    def run(inputs: LossInputs, mode: str) -> Gradients:
        offsets, reference = inputs.row_offsets.device, inputs.reference_sums
        if mode == "live":
            with torch.no_grad():
                frozen = nll(inputs.reference_hidden, inputs.reference_head, inputs.targets)
                reference = -segment_sums(frozen.float(), offsets)
        logprobs = -nll(inputs.hidden, inputs.head, inputs.targets).float()
        return gradients(FUNCTIONS[inputs.objective](logprobs, offsets, reference), inputs)

    return of_modes(who, again, computes, run, shape)


def from_mean(who: str, again: int, computes: str, mean: Nll, shape: LossShape) -> list[LossProvider]:
    """Return providers given ``mean``, which computes the mean of −ℓ: one call for NLL, two for GradDiff."""

    def run(inputs: LossInputs, _mode: str) -> Gradients:
        if inputs.objective == "NLL":
            return gradients(mean(inputs.hidden, inputs.head, inputs.targets), inputs)
        half = len(inputs.targets) // 2
        forget = mean(inputs.hidden[:half], inputs.head, inputs.targets[:half])
        return gradients(mean(inputs.hidden[half:], inputs.head, inputs.targets[half:]) - forget, inputs)

    return of_modes(who, again, computes, run, shape) if shape.objective in ("NLL", "GradDiff") else []


class _Products:
    """The vendor's matrix products, into one reused matrix of logits: a lower bound for every implementation."""

    def __init__(self) -> None:
        self._logits: Tensor | None = None

    def __call__(self, inputs: LossInputs, mode: str) -> Gradients:
        hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
        shape = (hidden.shape[0], weight.shape[0])
        if self._logits is None or self._logits.shape != shape:
            self._logits = hidden.new_empty(shape)
        if mode == "live":
            torch.mm(inputs.reference_hidden, inputs.reference_weight.t(), out=self._logits)
        torch.mm(hidden, weight.t(), out=self._logits)
        if mode.startswith("frozen"):
            return (torch.mm(self._logits, weight),)
        return torch.mm(self._logits, weight), torch.mm(self._logits.t(), hidden)


def products(shape: LossShape) -> list[LossProvider]:
    """Return the products of each mode."""
    return of_modes(PRODUCTS, 0, "the products alone", _Products(), shape)


def ours(shape: LossShape) -> list[LossProvider]:
    """Return efface with the native or Triton backend, and with torch.

    It needs no product beyond the floor, and one chunk of logits is alive at a time.
    """
    backends = ("native" if shape.device == "cpu" else "triton", "torch")
    return [provider for backend in backends for provider in _ours_by(backend, shape)]


def _ours_by(backend: str, shape: LossShape) -> list[LossProvider]:
    def run(inputs: LossInputs, mode: str) -> Gradients:
        reference = ReferenceRows(inputs.reference_hidden, inputs.reference_head) if mode == "live" else None
        head: dict[str, Any] = {"bias": inputs.bias, "softcap": inputs.softcap, "backend": backend}
        rows = (inputs.hidden, inputs.weight, inputs.targets)
        if inputs.rule is None:
            assert reference is not None
            return gradients(linear_distribution_loss(*rows, 1 / len(inputs.targets), reference, **head).loss, inputs)
        loss = linear_sequence_loss(
            *rows,
            inputs.row_offsets,
            inputs.rule,
            pairs=len(inputs.reference_sums) // 2 if inputs.objective == "DPO" else 0,
            reference=reference,
            reference_sums=inputs.reference_sums if mode.endswith("cached") else None,
            **head,
        ).loss
        return gradients(loss, inputs)

    return of_modes(f"{OURS} {backend}", 0, f"{backend} passes, gradients in the forward call", run, shape)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.float()


def eager_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, targets: Tensor) -> Tensor:
    """Compute the losses in plain torch: all logits in memory, ``cross_entropy`` on an fp32 copy."""
    return F.cross_entropy(_logits(hidden, weight, bias, softcap), targets, reduction="none")


def _divergence(logits: Tensor, reference: Tensor) -> Tensor:
    logp, logq = torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)
    return F.kl_div(logp, logq, reduction="batchmean", log_target=True)


def eager(who: str, computes: str, shape: LossShape, wrap: Wrapper = lambda f: f) -> list[LossProvider]:
    """Return providers with ``eager_nll``, or ``kl_div`` for KL, optionally wrapped (compiled)."""
    if shape.objective != KL:
        nll = wrap(eager_nll)

        def with_head(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
            return nll(hidden, head.weight, head.bias, head.softcap, targets)

        return from_nll(who, 0, computes, with_head, shape)
    divergence = wrap(_divergence)

    def run(inputs: LossInputs, _mode: str) -> Gradients:
        head, frozen = inputs.head, inputs.reference_head
        with torch.no_grad():
            reference = _logits(inputs.reference_hidden, frozen.weight, frozen.bias, frozen.softcap)
        logits = _logits(inputs.hidden, head.weight, head.bias, head.softcap)
        return gradients(divergence(logits, reference), inputs)

    return of_modes(who, 0, computes, run, shape)


def _eager(name: str, shape: LossShape) -> Found:
    plain = eager(name, "all logits, a copy in fp32", shape)
    return plain + eager(COMPILED, "the same, compiled", shape, lambda f: torch.compile(f, dynamic=False)), []


def _by_reduction(
    who: str, again: tuple[int, int], shape: LossShape, op: Callable[[Tensor, Head, Tensor, str], Tensor]
) -> list[LossProvider]:
    """Return providers from a cross entropy with a reduction: "mean" if the objective allows it, otherwise "none".

    ``again``: products beyond the floor with "mean", for which some ops compute gradients in the forward call, and with
    "none".
    """
    mean = from_mean(who, again[0], "reduction mean", lambda h, head, t: op(h, head, t, "mean"), shape)
    return mean or from_nll(who, again[1], "reduction none", lambda h, head, t: op(h, head, t, "none"), shape)


_TUNED_ROWS = 2048  # rows of a chunk


def _torch_chunked(name: str, shape: LossShape) -> Found:
    """``torch.nn.functional.linear_cross_entropy`` in chunks: with its own rule ("auto") and with larger chunks.

    With reduction "none" its backward pass recomputes the logits; with "mean" it does not.
    """
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return [], [f"{name}: torch {torch.__version__} has no chunked linear_cross_entropy"]
    tuned = (256, 1024) if shape.device == "cpu" else (_TUNED_ROWS,)
    options: dict[str, dict[str, Any]] = {
        f"chunks of {rows}": {"batch_chunk_size": rows} for rows in tuned if rows <= shape.n
    }
    missing = []
    # Above 1e10 operations, its chunks of 128 rows take minutes per call in bf16.
    if shape.device == "cpu" and shape.dtype.itemsize < 4 and shape.n * shape.d * shape.v > 1e10:
        missing.append(f"{name}, auto: in half precision on a CPU its chunks take minutes a call; see the smaller rows")
    else:
        options = {"auto": {}, **options}
    found = []
    for setting, given in options.items():
        by = torch.nn.LinearCrossEntropyOptions(**given)

        def op(hidden: Tensor, head: Head, targets: Tensor, reduction: str, by: Any = by) -> Tensor:
            return F.linear_cross_entropy(
                hidden, head.weight, targets, linear_bias=head.bias, reduction=reduction, options=by
            )

        found += _by_reduction(f"{name}, {setting}", (0, 1), shape, op)
    return found, missing


def liger_budget(n: int, d: int, v: int, rows: int = _TUNED_ROWS) -> int:
    """Return the smallest ``chunk_mem_const`` for which a chunk has ``rows`` rows, or all rows if there are fewer."""
    pieces = max(1, n // rows)
    return math.ceil(v / (pieces * d))


def _liger(name: str, shape: LossShape, flce: Any) -> Found:
    """liger-kernel's fused linear cross entropy: with its own chunk rule and with larger chunks (``chunk_mem_const``).

    Its chunk is the smallest power of two that is at least N / ceil(V / (chunk_mem_const · D)): 256 rows at N = 8192, D
    = 2048, V = 128256. With reduction "none" its backward pass recomputes the logits; with "mean" it computes the
    gradients in the forward call.
    """
    found, missing = [], []
    settings: dict[str, dict[str, int]] = {"default": {}}
    if "chunk_mem_const" in flce.__code__.co_varnames:
        settings["tuned"] = {"chunk_mem_const": liger_budget(shape.n, shape.d, shape.v)}
    else:
        missing.append(f"{name}, tuned: this release has no chunk_mem_const")
    for setting, given in settings.items():

        def op(hidden: Tensor, head: Head, targets: Tensor, reduction: str, given: dict[str, int] = given) -> Tensor:
            loss: Tensor = flce(
                hidden, head.weight, targets, bias=head.bias, softcap=head.softcap, reduction=reduction, **given
            )
            return loss

        found += _by_reduction(f"{name}, {setting}", (0, 1), shape, op)
    return found, missing


def _liger_dpo(name: str, shape: LossShape, chunked: Any) -> Found:
    """liger-kernel's chunked DPO in torch ops, a chunk of pairs at a time; the only other op with a reference model.

    "default": one pair per chunk; "tuned": chunks of 2048 rows. Both use ``torch.compile``, so the first call with a
    batch size takes long, half a minute on a CPU. The op expects the chosen sequences before the rejected ones, so each
    call copies the hidden states. Its loss is β/2 times ours.
    """

    def made(**settings: object) -> Callable[[LossInputs, str], Gradients]:
        loss = chunked(beta=BETA, **settings)

        def run(inputs: LossInputs, _mode: str) -> Gradients:
            head = (inputs.weight, *_chosen_first(inputs.hidden, inputs.targets))
            reference, frozen = _chosen_first(inputs.reference_hidden, inputs.targets)[0], inputs.reference_head
            value, *_ = loss(*head, inputs.bias, reference, frozen.weight, frozen.bias)
            return gradients(2 / BETA * value, inputs)

        return run

    tuned: dict[str, object] = {"chunk_size": _TUNED_ROWS // (2 * LENGTH)}
    settings: dict[str, dict[str, object]] = {"default": {}, "tuned": tuned}
    missing = []
    if shape.device == "cpu":
        settings = {"tuned": {**tuned, "compiled": False}}
        missing.append(f"{name}, default: compiles for half a minute on a CPU")
    found = []
    for setting, given in settings.items():
        found += of_modes(f"{name}, {setting}", 0, "torch ops in chunks of pairs", made(**given), shape, ("live",))
    return found, missing


def _chosen_first(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return (2 P, T, D) and (2 P, T): all alternates, then all forget sequences."""
    h, t = hidden.view(-1, 2, LENGTH, hidden.shape[1]), targets.view(-1, 2, LENGTH)
    return torch.cat([h[:, 1], h[:, 0]]), torch.cat([t[:, 1], t[:, 0]])


def _cut(name: str, shape: LossShape, linear_cross_entropy: Any) -> Found:
    """cut-cross-entropy: exact, and with its default, which drops small gradients; on a CPU ``torch_compile``.

    Its backward pass recomputes the logits, except for the filtered ones.
    """
    cpu = shape.device == "cpu"
    settings: dict[str, dict[str, object]] = {"exact": {"impl": "cce", "filter_eps": None}, "default": {"impl": "cce"}}
    if cpu:
        settings = {"torch_compile": {"impl": "torch_compile"}}
    again = 0 if cpu else 1
    found = []
    for setting, given in settings.items():

        def op(hidden: Tensor, head: Head, targets: Tensor, reduction: str, given: dict[str, object] = given) -> Tensor:
            loss: Tensor = linear_cross_entropy(
                hidden, head.weight, targets, softcap=head.softcap, reduction=reduction, **given
            )
            return loss

        found += _by_reduction(f"{name}, {setting}", (again, again), shape, op)
    return found, [f"{name}, exact and default: their Triton kernels need a GPU"] if cpu else []


def _quack(name: str, shape: LossShape, chunked: Any) -> Found:
    """quack-kernels: CuTe-DSL GEMMs with the softmax fused; only reduction mean or sum. It tunes its GEMMs itself."""

    def mean(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        loss: Tensor = chunked(hidden, head.weight, targets, reduction="mean")
        return loss

    return from_mean(name, 0, "reduction mean", mean, shape), []


RIVALS = (
    Rival(EAGER, _eager, OBJECTIVES),
    Rival("torch linear_cross_entropy", _torch_chunked, lacks=("soft-cap",)),
    Rival(
        "liger-kernel FLCE",
        _liger,
        op="liger_kernel.transformers.functional:liger_fused_linear_cross_entropy",
        gpu="its Triton kernels need a GPU",
    ),
    Rival(
        "liger-kernel chunked DPO",
        _liger_dpo,
        ("DPO",),
        op="liger_kernel.chunked_loss:LigerFusedLinearDPOLoss",
        lacks=("soft-cap",),
    ),
    Rival("cut-cross-entropy", _cut, op="cut_cross_entropy:linear_cross_entropy", lacks=("bias",)),
    Rival(
        "quack-kernels",
        _quack,
        ("NLL", "GradDiff"),
        op="quack.linear_cross_entropy:chunked_linear_cross_entropy",
        gpu="its kernels need a GPU",
        lacks=("bias", "soft-cap"),
    ),
)


def offered(rivals: Iterable[Rival], shape: LossShape, without: Sequence[str] = ()) -> Found:
    """Return the providers of other implementations for a shape, and the reasons why some are missing."""
    asked = (rival for rival in rivals if shape.objective in rival.objectives)
    kept, missing = able(asked, without, lambda rival: rival.why_not(shape))
    found: list[LossProvider] = []
    for rival in kept:
        own, reasons = rival.providers(shape)
        found += own
        missing += reasons
    return found, missing


def providers(shape: LossShape, without: Sequence[str] = ()) -> Found:
    """Return all providers for a shape: the bare products, ours and the others; and why some are missing.

    A provider whose name contains a text of ``without`` is left out, except the products. A left-out implementation is
    not imported.
    """
    found, missing = offered(RIVALS, shape, without)
    found = [*products(shape), *ours(shape), *found]
    return [each for each in found if each.who == PRODUCTS or not left_out(each.name, without)], missing
