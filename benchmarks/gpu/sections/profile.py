"""Where the time of one call goes: the kernels of the loss at the head, by torch's profiler."""

import functools
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.section import Run
from benchmarks.loss.inputs import Shape, make_inputs
from benchmarks.loss.objectives import KL
from benchmarks.loss.providers import ours

_CALLS = 3
_LISTED = 12
_SAID = 0.03  # of the time: kernels of less are in the results alone
_HEADS = {"Llama-3.2-1B": (2048, 128256), "Llama-2-7B": (4096, 32000)}


def run(run: Run) -> None:
    """Append a row for each kernel of NPO, live and cached, and of KL, for two heads.

    Raises:
        ArithmeticError: the profiler saw no kernel.
    """
    cases = [(head, "NPO", mode) for head in _HEADS for mode in ("live", "cached")] + [("Llama-3.2-1B", KL, "live")]
    for head, objective, mode in cases[:1] if run.smoke else cases:
        d, v = (32, 100) if run.smoke else _HEADS[head]
        dtype = torch.float32 if run.smoke else torch.bfloat16
        shape = Shape(64 if run.smoke else 8192, d, v, dtype, objective, (mode,), device=run.device)
        inputs = make_inputs(shape).of(mode)
        backend = "native" if run.smoke else "triton"
        provider = next(each for each in ours.providers(shape)[0] if each.who == f"{ours.NAME} {backend}")
        _profile(run, f"{head}, {objective}, {mode}", functools.partial(provider.run, inputs))


def _profile(run: Run, name: str, call: Callable[[], object]) -> None:
    gpu = run.device == "cuda"
    call()
    call()
    if gpu:
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * gpu]) as profiler:
        for _ in range(_CALLS):
            call()
        if gpu:
            torch.cuda.synchronize()
    events = profiler.key_averages()
    # On a GPU the operators of torch stand beside the kernels that they launch; only the kernels are counted.
    kind = "DeviceType.CUDA" if gpu else "DeviceType.CPU"
    spent = {
        event.key: (event.self_device_time_total if gpu else event.self_cpu_time_total, event.count)
        for event in events
        if str(event.device_type) == kind
    }
    if not spent:
        raise ArithmeticError(f"{name}: expected kernels, got none; the profiler sees nothing on this machine")
    total = sum(time for time, _ in spent.values())
    launches = sum(count for _, count in spent.values()) / _CALLS
    run.row(f"{name}: {total / _CALLS / 1e3:.2f} ms in {launches:.0f} kernels a call", call=name, kernels=launches)
    for key, (time, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:_LISTED]:
        share, each = time / total, time / count
        said = f"  {share:6.1%} {each:9.1f} us x {count / _CALLS:.0f}  {key[:70]}"
        run.row(said if share > _SAID else "", call=name, kernel=key, us=each, calls=count / _CALLS, share=share)
