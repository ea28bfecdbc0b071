"""The step suite: a whole training step of a Llama with random weights on TOFU's pairs, padded and packed.

NPO on plain rows; NPO and DPO on rows in Llama-3's chat template, whose beginning is the same in every sequence.

With ``--blocks``, and always on a GPU, the providers run one after another, so that each has all the memory.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.harness.report import Report, cells
from benchmarks.harness.shared import able, add_device, add_without, check_without
from benchmarks.harness.timing import median_ratio, spread
from benchmarks.step import attention
from benchmarks.step import run as runs
from benchmarks.step.attention import AttentionRow
from benchmarks.step.inputs import CHECKED_ON_GPU, SHAPES, Step, timed_on
from benchmarks.step.measures import PARTS, model_flop, peak_flops
from benchmarks.step.providers import PROVIDERS, baseline
from benchmarks.step.run import TOLERANCES, Errors, Kind, Outcome
from efface_kernels import resolve_backend

ROUNDS = 16  # every step twice


@dataclass
class StepRow:
    """One provider on one shape. Times in milliseconds: forward + backward, then with clipping and AdamW ("whole").

    Speed-ups are medians of the ratio within a round: to the eager step with its live second model, and to the eager
    step with the same kind of reference. For LoRA, both refer to the eager step with LoRA. Numbers are None if the
    provider has a problem, and speed-ups also if the eager step has one.
    """

    shape: str
    provider: str
    computes: str
    data: str
    training: str  # "full" or "LoRA"
    reference: str  # "live", "cached" or "adapter"
    real_tokens: float  # per step, mean over the steps
    padded_tokens: float
    tokens_run: float  # by the policy in this provider's step, mean over the steps
    error_loss: float  # relative to the eager step in the next wider dtype; on a GPU, in a smaller model
    error_gradient: float
    problem: str = ""
    objective: str = "npo"
    chat: bool = False  # rows in Llama-3's chat template
    loss_backend: str = ""  # backend of efface's loss, as "auto" selected it; on a GPU it can be torch
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    faster_than_live: float | None = None
    faster_than_same: float | None = None
    faster_than_unshared: float | None = None  # if it runs shared beginnings once: than with every sequence whole
    whole_median_ms: float | None = None
    whole_low_ms: float | None = None
    whole_high_ms: float | None = None
    whole_faster_than_live: float | None = None
    whole_faster_than_same: float | None = None
    tokens_per_second: float | None = None  # real tokens (shared ones count for each sequence), whole step
    utilisation: float | None = None  # model FLOP (``measures.model_flop``) / data-sheet bf16 peak of the GPU
    peak_gib: float | None = None  # of GPU memory: models, gradients, optimizer states, activations
    step_mib: float | None = None  # of CPU memory: what forward and backward of the largest step allocate at most
    first_loss: float | None = None
    parts_ms: dict[str, float] = field(default_factory=dict)  # ``measures.PARTS``, medians
    rounds_ms: list[float] = field(default_factory=list, repr=False)
    rounds_whole_ms: list[float] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Setting:
    """The settings that all rows of a shape share."""

    name: str
    data: str
    device: str
    errors: Mapping[Kind, Errors]
    steps: Mapping[bool, Sequence[Step]]


def rows_of(setting: Setting, outcomes: Mapping[Kind, Outcome]) -> list[StepRow]:
    """Return a row for every provider that has run."""
    part = {k: [sum(p[n] for n in PARTS if n != "update") for p in o.parts] for k, o in outcomes.items()}
    whole = {k: [sum(p[n] for n in PARTS) for p in o.parts] for k, o in outcomes.items()}
    for kind, outcome in outcomes.items():
        _compare_first_losses(setting, outcome, baseline(kind, SHAPES[setting.name].objective.name)[0], outcomes)
    return [_row(setting, kind, outcomes, part, whole) for kind in PROVIDERS if kind in outcomes]


def _compare_first_losses(setting: Setting, outcome: Outcome, live: Kind, outcomes: Mapping[Kind, Outcome]) -> None:
    """Set a problem if the first loss is not the eager step's. Both are rounded, so twice the tolerance applies."""
    eager = outcomes.get(live)
    if eager is None or eager.problem or outcome.problem:
        return
    allowed = 2 * TOLERANCES[SHAPES[setting.name].dtype].widened(setting.errors[live]).loss
    if not abs(outcome.first_loss - eager.first_loss) <= allowed * abs(eager.first_loss):
        outcome.problem = f"wrong loss: expected {eager.first_loss:.6g}, got {outcome.first_loss:.6g}"


def _row(
    setting: Setting,
    kind: Kind,
    outcomes: Mapping[Kind, Outcome],
    part: Mapping[Kind, list[float]],
    whole: Mapping[Kind, list[float]],
) -> StepRow:
    steps, outcome, shape = setting.steps[kind.lora], outcomes[kind], SHAPES[setting.name]
    row = StepRow(
        shape=setting.name,
        provider=kind.name,
        computes=(kind.__doc__ or "").splitlines()[0],
        data=setting.data,
        training="LoRA" if kind.lora else "full",
        reference=kind.reference,
        real_tokens=statistics.mean(step.batch.tokens for step in steps),
        padded_tokens=statistics.mean(step.padded_tokens for step in steps),
        tokens_run=statistics.mean(map(kind.tokens, steps)),
        error_loss=setting.errors[kind].loss,
        error_gradient=setting.errors[kind].gradient,
        problem=outcome.problem,
        objective=shape.objective.name,
        chat=shape.chat,
        loss_backend=resolve_backend("auto", steps[0].batch.input_ids.device) if kind.ours else "",
    )
    mine, all_mine = part[kind], whole[kind]
    if outcome.problem or not mine:
        return row
    live, cached = baseline(kind, shape.objective.name)
    same = cached if kind.reference == "cached" else live
    row.faster_than_live, row.faster_than_same = (_faster(outcomes, part, each, kind) for each in (live, same))
    if kind.shares is not None:
        row.faster_than_unshared = _faster(outcomes, part, kind.shares, kind)
    row.whole_faster_than_live, row.whole_faster_than_same = (
        _faster(outcomes, whole, each, kind) for each in (live, same)
    )
    seconds = [ms / 1e3 for ms in all_mine]
    taken = [steps[i % len(steps)] for i in range(len(seconds))]
    row.tokens_per_second = statistics.median(
        step.batch.tokens / time for step, time in zip(taken, seconds, strict=True)
    )
    peak = peak_flops(torch.cuda.get_device_name(0)) if setting.device == "cuda" else None
    if peak is not None:
        config = shape.llama()
        flop = [model_flop(config, kind.batch(step), lora=kind.lora, reference=kind.reference) for step in taken]
        row.utilisation = statistics.median(f / s for f, s in zip(flop, seconds, strict=True)) / peak
    row.peak_gib, row.step_mib, row.first_loss = outcome.peak_gib, outcome.step_mib, outcome.first_loss
    row.parts_ms = {name: statistics.median(parts[name] for parts in outcome.parts) for name in PARTS}
    row.rounds_ms, row.rounds_whole_ms = mine, all_mine
    times: dict[str, Any] = spread(mine) | spread(all_mine, "whole_")
    return replace(row, **times)


def _faster(
    outcomes: Mapping[Kind, Outcome], times: Mapping[Kind, list[float]], than: Kind, kind: Kind
) -> float | None:
    if than not in outcomes or outcomes[than].problem:
        return None
    rounds = min(len(times[than]), len(times[kind]))  # in an interrupted run, one may have more rounds
    return median_ratio(times[than][:rounds], times[kind][:rounds]) if rounds else None


def measure(
    name: str,
    rounds: int,
    device: str = "cpu",
    *,
    blocks: bool = False,
    without: Sequence[str] = (),
    seen: Callable[[Sequence[StepRow]], None] = lambda _: None,
) -> tuple[list[StepRow], list[str]]:
    """Check every provider and time those that pass; return their rows, and why others are left out.

    On a GPU the check uses a smaller model, and the first losses of the large one are compared with the eager step's.
    ``without`` leaves out providers whose name contains one of its texts. ``seen`` receives the rows so far after every
    block.
    """
    shape = SHAPES[name]
    own = [kind for kind in PROVIDERS if shape.objective.name in kind.objectives]
    kinds, missing = able(own, without, lambda kind: kind.why_not(device))
    small = SHAPES[CHECKED_ON_GPU] if device == "cuda" else shape
    steps, data = runs.steps_of(kinds, small, device)
    errors, refused = runs.checked(kinds, small, device, steps)
    kinds = [kind for kind in kinds if kind in errors]
    if small is not shape:
        steps, data = runs.steps_of(kinds, shape, device)
    setting = Setting(name, data, device, errors, steps)
    rows: list[StepRow] = []
    if blocks or device == "cuda":
        progress = runs.by_blocks(kinds, shape, steps, device, rounds)
    else:
        progress = iter([runs.by_rounds(kinds, shape, steps, device, rounds)])
    for outcomes in progress:
        rows = rows_of(setting, outcomes)
        seen(rows)
    return rows, [*missing, *refused]


def default_shapes(options: argparse.Namespace) -> list[str]:
    shapes = timed_on(options.device)
    return [name for name in shapes if not SHAPES[name].chat] if options.quick else shapes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument(
        "--blocks", action="store_true", help="run one provider after another; always the case on a GPU"
    )
    add_without(parser)
    parser.add_argument("--quick", action="store_true", help="leave out the shapes with a chat template by default")


def run(options: argparse.Namespace, report: Report) -> None:
    check_without(options.without, [kind.name for kind in PROVIDERS])
    rows: list[StepRow] = []
    layers: list[AttentionRow] = []
    missing: set[str] = set()

    def save(part: Sequence[StepRow]) -> None:
        report.save(step=[*rows, *part], not_measured=sorted(missing))

    for name in options.shape:
        measured, absent = measure(
            name, options.rounds, options.device, blocks=options.blocks, without=options.without, seen=save
        )
        rows += measured
        missing.update(absent)
        _tables(report, name, options, measured)
        if SHAPES[name].chat:
            layers += attention.measure(name, SHAPES[name], options.device, options.rounds)
            _attention_table(report, [row for row in layers if row.shape == name])
        report.save(attention=layers, not_measured=sorted(missing))
    for reason in sorted(missing):
        report.note(f"not measured: {reason}")


def _tables(report: Report, name: str, options: argparse.Namespace, rows: list[StepRow]) -> None:
    if not rows:
        return
    first, shape = rows[0], SHAPES[name]
    blocks = ", two blocks each" if options.blocks or options.device == "cuda" else ""
    report.note(
        f"{name}: {shape.objective.name}, {shape.pairs} forget/retain pairs per step, {shape.steps} steps of "
        f"{first.data}, "
        f"{options.rounds} rounds{blocks}. Mean tokens per step: {first.real_tokens:.0f} real, "
        f"{first.padded_tokens:.0f} padded ({first.padded_tokens / first.real_tokens:.2f} x)."
    )
    headings = ("median ms", "low", "high", "x live", "x same")
    report.table(
        "forward + backward ('x live': speed-up over the padded step with a live second model, for LoRA the one "
        "with LoRA; 'x same': over the padded step with the same kind of reference; 'x unshared': over the same with "
        "every sequence whole)",
        ("provider", "tokens run", *headings, "x unshared", "step MiB", "error loss", "error gradient"),
        [_part(row) for row in rows],
    )
    report.table(
        "with gradient clipping and AdamW (its states in the weights' dtype)",
        ("provider", *headings, "tokens/s", "MFU", "peak GiB"),
        [_whole(row) for row in rows],
    )
    report.table(
        "parts of a step, median ms",
        ("provider", *PARTS),
        [[row.provider, *cells(".1f", *map(row.parts_ms.get, PARTS))] for row in rows],
    )


def _attention_table(report: Report, rows: Sequence[AttentionRow]) -> None:
    report.table(
        "attention of one layer; the last row is a part of the second, and its share of it",
        ("batch", "tokens", "keys", "forward ms", "backward ms", "forward share", "backward share"),
        [
            [
                *(row.part, str(row.tokens), str(row.keys)),
                *cells(".2f", row.forward_ms, row.backward_ms),
                *cells(".0%", row.forward_share, row.backward_share),
            ]
            for row in rows
        ],
    )


def _part(row: StepRow) -> list[str]:
    if row.problem:
        return [row.provider, row.problem, *[""] * 9]
    times = cells(".1f", row.median_ms, row.low_ms, row.high_ms)
    ratios = cells(".2f", row.faster_than_live, row.faster_than_same, row.faster_than_unshared)
    errors = cells(".1e", row.error_loss, row.error_gradient)
    return [row.provider, f"{row.tokens_run:.0f}", *times, *ratios, *cells(".0f", row.step_mib), *errors]


def _whole(row: StepRow) -> list[str]:
    if row.problem:
        return [row.provider, row.problem, "", "", "", "", "", "", ""]
    times = cells(".1f", row.whole_median_ms, row.whole_low_ms, row.whole_high_ms)
    ratios = cells(".2f", row.whole_faster_than_live, row.whole_faster_than_same)
    use = [*cells(".0f", row.tokens_per_second), *cells(".1%", row.utilisation), *cells(".1f", row.peak_gib)]
    return [row.provider, *times, *ratios, *use]
