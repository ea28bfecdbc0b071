"""The loss suite: objectives at the head, forward and backward, with all providers interleaved in one run.

On the CPU, or on a GPU with ``--device cuda``: NPO with a live reference, a cached one, and a cached one with a frozen
head; SimNPO, DPO, NLL, GradDiff and the KL retain loss. Providers with wrong gradients are listed and not timed.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.report import Report, cells, gpu_clocks, said
from benchmarks.harness.shared import add_device, add_without, check_without
from benchmarks.harness.timing import interleaved, interleaved_on_gpu, median_ratio, spread, wall_times
from benchmarks.loss.inputs import CHECKS, SHAPES, LossInputs, LossShape, gold, make_inputs
from benchmarks.loss.providers import COMPILED, EAGER, PRODUCTS, RIVALS, LossProvider, providers
from efface_kernels import row_pass

ROUNDS = 9
_SECONDS = {"cpu": 150.0, "cuda": 6.0}  # time for a shape's rounds; at least three rounds run
# Gradients are compared with fp64 on at most this many rows, because all rows would take most of the time.
_COMPARED_ROWS = {"cpu": 256, "cuda": 4096}  # on a GPU, more than one chunk
_WALL_ROUNDS = 3
_WITH_PEAK_ON_CPU = ("Llama-2 head, D 1024, bf16", "Llama-3.2-1B head, bf16")
# Largest relative rms error of a gradient against fp64. Up to three times eager's own error is accepted as well;
# providers beyond that are not timed.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_NAMES = ("dh", "dw", "db")


def default_shapes(options: argparse.Namespace) -> list[str]:
    return [name for name, shape in SHAPES.items() if name != "smoke" and shape.device == options.device]


@dataclass
class LossRow:
    """One provider on one shape. Times are in milliseconds; errors are relative to the rms of the fp64 gradient."""

    shape: str
    objective: str
    mode: str
    who: str
    provider: str
    n: int
    d: int
    v: int
    dtype: str
    state: str
    computes: str
    gemms: int
    rounds: int
    median_ms: float
    quarter_ms: float
    three_quarters_ms: float
    low_ms: float
    high_ms: float
    against_floor: float  # median of the ratio to the bare GEMMs within a round
    of_floor_percent: float  # the inverse: the time of the bare products as a share of this time
    errors: dict[str, float] = field(default_factory=dict)  # dh, dw, db
    wall_ms: float | None = None  # median on a GPU of a call from an idle device to its end, with launches
    peak_gib: float | None = None  # beyond inputs and gradients: of GPU memory, or resident
    clocks: dict[str, str] = field(default_factory=dict)  # of a GPU, before and after the row


def _relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())


def checked(found: list[LossProvider], shape: LossShape) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Return the errors of the providers with correct gradients, and the reasons why others are not timed.

    Each provider runs on a smaller batch with the same head. An exception in one does not affect the others.
    """
    inputs = make_inputs(shape, rows=min(shape.n, _COMPARED_ROWS[shape.device]))
    errors: dict[str, dict[str, float]] = {}
    refused = []
    for mode in shape.modes:
        exact = gold(inputs, mode)
        # eager comes first, because its own rounding error widens the tolerance for the others
        own = sorted((p for p in found if p.mode == mode), key=lambda p: p.who != EAGER)
        allowed = dict.fromkeys(_NAMES, TOLERANCES[shape.dtype])
        for provider in own:
            if provider.who == PRODUCTS:
                errors[provider.name] = {}
                continue
            try:
                got = provider.run(inputs.of(mode))
            except Exception as error:  # noqa: BLE001 - other implementations can raise anything
                refused.append(f"{provider.name}: {said(error)}")
                continue
            apart = {n: _relative(g, e) for n, g, e in zip(_NAMES, got, exact, strict=False)}
            if provider.who == EAGER:
                allowed = {n: max(allowed[n], 3 * e) for n, e in apart.items()}
            wrong = [f"{n} is off by {e:.1e}" for n, e in apart.items() if not e <= allowed[n]]
            if len(got) != len(exact):
                wrong.append(f"{len(got)} gradients, expected {len(exact)}")
            if wrong:
                refused.append(f"{provider.name}: gradients differ from fp64, {', '.join(wrong)}")
            else:
                errors[provider.name] = apart
        del exact
    return errors, refused


def _peak_gib(provider: LossProvider, inputs: LossInputs) -> float | None:
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        gradients = provider.run(inputs.of(provider.mode))
    except torch.OutOfMemoryError:
        return None
    torch.cuda.synchronize()
    kept = sum(each.nbytes for each in gradients)
    return (torch.cuda.max_memory_allocated() - before - kept) / (1 << 30)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def resident_peak(shape_name: str, provider_name: str) -> float:
    """Return a provider's peak of resident memory in GiB, beyond inputs and gradients; run in a fresh process.

    A small batch runs first, so that libraries, thread stacks and compilation do not count.
    """
    shape = SHAPES[shape_name]
    provider = next(each for each in providers(shape)[0] if each.name == provider_name)
    provider.run(make_inputs(replace(shape, n=64, d=64, v=512)).of(provider.mode))
    inputs = make_inputs(shape).of(provider.mode)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    before = _status("VmRSS")
    gradients = provider.run(inputs)
    kept = sum(each.nbytes for each in gradients)
    return (_status("VmHWM") - before - kept) / (1 << 30)


def _resident_gib(name: str, provider: LossProvider) -> float | None:
    command = [sys.executable, "-m", "benchmarks.loss.suite", name, provider.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.strip() else None


def _rounds_for(calls: dict[str, Callable[[int], object]], options: argparse.Namespace, device: str) -> int:
    """Return the number of rounds that fit into the shape's time, from the time of one. Every call has run before."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for call in calls.values():
        call(0)
    if device == "cuda":
        torch.cuda.synchronize()
    most: int = options.rounds
    seconds = _SECONDS[device] if options.seconds is None else options.seconds
    return max(min(3, most), min(most, int(seconds / (time.perf_counter() - begin))))


def measure(name: str, options: argparse.Namespace) -> tuple[list[LossRow], list[str]]:
    """Check all providers on a shape, then time them interleaved, with one call of each per round."""
    # Dynamo counts the compilations of a function over all shapes. Beyond its limit it silently runs the function
    # eagerly.
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=64):  # noqa: SLF001 - the documented place of the setting
        return _measure(name, options)


def _measure(name: str, options: argparse.Namespace) -> tuple[list[LossRow], list[str]]:
    shape = SHAPES[name]
    gpu = shape.device == "cuda"
    found, missing = providers(shape, options.without)
    errors, refused = checked(found, shape)
    missing += [f"{reason} ({name})" for reason in refused]
    inputs = make_inputs(shape)
    given = {mode: inputs.of(mode) for mode in shape.modes}
    timed = []
    for provider in found:
        if provider.name in errors:
            try:
                provider.run(given[provider.mode])
            except Exception as error:  # noqa: BLE001 - usually out of memory with all rows
                missing.append(f"{provider.name}: {said(error)} ({name})")
            else:
                timed.append(provider)
                continue
            if gpu:  # by now no traceback refers to the memory of a failed provider
                torch.cuda.empty_cache()
    calls = {each.name: _call(each, given[each.mode]) for each in timed}
    before = gpu_clocks() if gpu else ""
    rounds = _rounds_for(calls, options, shape.device)
    times = (interleaved_on_gpu if gpu else interleaved)(calls, rounds)
    clocks = {"before": before, "after": gpu_clocks()} if gpu else {}
    wall = wall_times(calls, min(rounds, _WALL_ROUNDS)) if gpu else {}
    rows = []
    for provider in timed:
        own, floor = times[provider.name], times[f"{PRODUCTS}, {provider.mode}"]
        quarters = statistics.quantiles(own, n=4, method="inclusive") if len(own) > 1 else [own[0]] * 3
        row = LossRow(
            shape=name,
            objective=shape.objective,
            mode=provider.mode,
            who=provider.who,
            provider=provider.name,
            n=shape.n,
            d=shape.d,
            v=shape.v,
            dtype=str(shape.dtype).removeprefix("torch."),
            state="after unlearning" if shape.unlearned else "memorised",
            computes=provider.computes,
            gemms=provider.gemms,
            rounds=rounds,
            **spread(own),
            quarter_ms=quarters[0],
            three_quarters_ms=quarters[2],
            against_floor=median_ratio(own, floor),
            of_floor_percent=100 * median_ratio(floor, own),
            errors=errors[provider.name],
            wall_ms=statistics.median(wall[provider.name]) if gpu else None,
            clocks=clocks,
        )
        if provider.who != PRODUCTS and gpu:
            row.peak_gib = _peak_gib(provider, inputs)
        elif provider.who != PRODUCTS and options.memory and name in _WITH_PEAK_ON_CPU:
            row.peak_gib = _resident_gib(name, provider)
        rows.append(row)
    return rows, missing


def _call(provider: LossProvider, inputs: LossInputs) -> Callable[[int], object]:
    return lambda _: provider.run(inputs)


def row_pass_alone(rounds: int) -> dict[str, float]:
    """Time the pass on (1024, 32000) bf16 against torch's ``log_softmax`` on fp32 logits plus ``gather``, in ms."""
    logits = torch.randn(1024, 32000, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.zeros(1024, dtype=torch.int64)
    # The pass overwrites its logits. A second run does the same amount of work, because no time depends on the values.
    work = logits.clone()
    calls: dict[str, Callable[[int], object]] = {
        "native row pass, gradient in place": lambda _: row_pass(work, targets, backend="native"),
        "native row pass, log-probabilities only": lambda _: row_pass(
            logits, targets, gradient=False, backend="native"
        ),
        "torch log_softmax(float) + gather": lambda _: torch.log_softmax(logits.float(), -1).gather(
            1, targets[:, None]
        ),
    }
    return {name: statistics.median(times) for name, times in interleaved(calls, rounds, warm_up=1).items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory", action="store_true", help="on the CPU, measure peak memory too, in a process per provider (slow)"
    )
    parser.add_argument("--check", action="store_true", help="compare the gradients of every provider without timing")
    add_device(parser)
    add_without(parser)
    parser.add_argument("--seconds", type=float, help="time limit for the rounds of a shape; at least three rounds run")


def check(report: Report) -> None:
    """Compare every provider with fp64 on small shapes of the CPU.

    Raises:
        ArithmeticError: a provider raises an error, or its gradients are wrong.
    """
    wrong: list[str] = []
    for shape in CHECKS:
        found, _ = providers(shape)
        errors, refused = checked(found, shape)
        wrong += [f"{reason} ({shape})" for reason in refused]
        body = [[name, *cells(".1e", *(each.get(n, 0) for n in _NAMES))] for name, each in errors.items() if each]
        report.table(str(shape), ("provider", *_NAMES), body)
    if wrong:
        raise ArithmeticError("\n".join(wrong))


def _check_without(options: argparse.Namespace) -> None:
    rivals = [rival.name for rival in RIVALS]  # by name only: they are not imported and need not be installed
    names = {provider.name for shape in options.shape for provider in providers(SHAPES[shape], rivals)[0]}
    names |= {*rivals, COMPILED}
    check_without(options.without, sorted(names))


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure the chosen shapes; on the CPU, also the row pass alone."""
    if options.check:
        check(report)
        return
    _check_without(options)
    rows: list[LossRow] = []
    notes: set[str] = set()
    report.save(loss=[], not_measured=[])  # so that an interrupted run leaves a valid file
    for name in options.shape:
        shape = SHAPES[name]
        try:
            measured, missing = measure(name, options)
        except Exception as error:  # one failing implementation must not cost the other shapes
            if options.device == "cpu":
                raise
            measured, missing = [], [f"{name}: {said(error)}"]
        rows += measured
        notes.update(missing)
        rounds = measured[0].rounds if measured else 0
        report.table(
            f"{name}: {shape.objective}, N {shape.n}, D {shape.d}, V {shape.v}, {shape.dtype}, {rounds} rounds",
            (
                "provider",
                "GEMMs",
                "median ms",
                "quartiles",
                "x floor",
                "% of floor",
                "error dh",
                "error dW",
                "wall ms",
                "peak GiB",
            ),
            [_cells(row) for row in measured],
        )
        report.save(loss=rows, not_measured=sorted(notes))
    for note in sorted(notes):
        report.note(f"not measured: {note}")
    if options.device == "cpu" and options.shape != ["smoke"]:
        alone = row_pass_alone(options.rounds)
        for name, value in alone.items():
            report.note(f"{name}, (1024, 32000) bf16: {value:.2f} ms")
        report.save(row_pass_ms=alone)


def _cells(row: LossRow) -> list[str]:
    quartiles = f"{row.quarter_ms:.2f} .. {row.three_quarters_ms:.2f}"
    ratio = [f"{row.against_floor:.2f}", f"{row.of_floor_percent:.0f}"]
    errors = cells(".1e", *(row.errors.get(n) for n in ("dh", "dw")))
    more = cells(".2f", row.wall_ms, row.peak_gib)
    return [row.provider, str(row.gemms), f"{row.median_ms:.2f}", quartiles, *ratio, *errors, *more]


if __name__ == "__main__":  # SHAPE PROVIDER, started by ``_resident_gib``
    torch.set_num_threads(2)
    print(resident_peak(*sys.argv[1:]))
