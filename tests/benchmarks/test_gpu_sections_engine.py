"""Tests of the sections of a borrowed GPU that run the engine, on a CPU: attention and the trainer."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
WARNING = "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:349.)"
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
Measure = Callable[..., list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make the benchmarks importable, without TOFU."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.harness import shared

    monkeypatch.setattr(shared, "FOLDER", tmp_path / "absent")


@pytest.fixture
def measure(tmp_path: Path) -> Measure:
    """Return a function that runs a section on the CPU and returns its rows."""

    def measure(section: ModuleType, *arguments: str, fails: str = "") -> list[dict[str, Any]]:
        from benchmarks.gpu.section import RESULTS, Run

        run = Run("here", tmp_path, arguments, "cpu")
        if fails:
            with pytest.raises(ArithmeticError, match=fails):
                section.run(run)
        else:
            section.run(run)
        return [json.loads(line) for line in (tmp_path / RESULTS).read_text().splitlines()]

    return measure


def test_attention_is_measured_case_by_case(measure: Measure) -> None:
    from benchmarks.gpu.sections import attention

    *rows, gathered = measure(attention)
    assert gathered["repeats"]
    assert gathered["error"] < 1e-6
    assert gathered["keys"] > gathered["tokens"]
    assert gathered["gather_ms"] > 0
    assert [row["case"] for row in rows] == [case.name for case in attention.cases(smoke=True)]
    for row in rows:
        assert row["repeats"] == list(attention.NAMES)
        assert row["ms"] > 0
        assert row["kernel"] == "segments"  # the kernel of a CPU
        assert all(error <= 1e-5 for error in row["errors"].values())


def test_the_cases_on_a_gpu_are_those_on_a_cpu_with_more_tokens() -> None:
    from benchmarks.gpu.sections import attention

    large, small = (attention.cases(smoke=smoke) for smoke in (False, True))
    assert [replace(case, lengths=(), key_lengths=None, window=None) for case in large] == [
        replace(case, lengths=(), key_lengths=None, window=None) for case in small
    ]
    assert {case.head_dim for case in large} == {64, 128}
    assert any(case.heads == 4 * case.key_heads for case in large)
    for case in [*large, *small]:
        assert all(n <= m for n, m in zip(case.lengths, case.keys, strict=True))
        assert case.window is None or case.window < max(case.lengths)
    mixed = [case for case in large if 1 in case.lengths]
    assert len(mixed) == len(large) - 1
    assert all(max(case.lengths) == 2048 and 4000 < sum(case.lengths) < 8192 for case in mixed)


def test_wrong_attention_is_reported_and_the_other_cases_are_measured(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu.sections import attention

    right, calls = attention.by_loop, []

    def wrong(query: Any, key: Any, value: Any, case: Any) -> Any:
        if case.head_dim == 128:
            raise RuntimeError("no kernel image\nis available")
        calls.append(1)
        noise = 1e-4 * len(calls) if case.window else 0.0  # different bits every time, within the tolerance
        out = right(query, key, value, case) * (1 + noise)
        return out.detach() if case.key_lengths is None and not case.window else out

    monkeypatch.setattr(attention, "by_loop", wrong)
    *rows, _ = measure(attention, fails="grouped heads of 128: RuntimeError: no kernel image")
    assert [row["case"] for row in rows] == [case.name for case in attention.cases(smoke=True)]
    by_case = {row["case"]: row for row in rows}
    assert by_case["heads of 128"]["said"] == "heads of 128: RuntimeError: no kernel image"
    assert "does not require grad" in by_case["heads of 64"]["problem"]
    assert by_case["a sliding window"]["repeats"] == []
    assert "differs bitwise in a second run" in by_case["a sliding window"]["wrong"][-1]
    assert by_case["more keys than queries"]["wrong"] == []

    monkeypatch.setattr(attention, "by_loop", lambda *a: 1.01 * right(*a))
    rows = measure(
        attention, fails="heads of 64: out has an error of 1.0e-02 against torch.float64, expected at most 1.0e-03"
    )


def test_torchs_kernel_gets_the_arguments_of_the_case(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The kernel and the operator below it are replaced by the loop, with their signatures of torch 2.11."""
    from benchmarks.gpu.section import Run
    from benchmarks.gpu.sections import attention

    from efface.hf.model.attention import torch_varlen

    loop = attention.by_loop

    def case_of(query: Any, key: Any, borders: Any, keys: Any, longest: tuple[int, int], left: int) -> Any:
        lengths, key_lengths = (tuple(each.diff().tolist()) for each in (borders, keys))
        assert longest == (max(lengths), max(key_lengths))
        heads, key_heads, window = query.shape[1], key.shape[1], None if left == -1 else left + 1
        return attention.AttentionCase("", heads, key_heads, query.shape[2], lengths, key_lengths, window)

    def forward(q: Any, k: Any, v: Any, borders: Any, keys: Any, *longest: int, **options: Any) -> Any:
        assert options["window_size"][1] == 0
        case = case_of(q, k, borders, keys, longest, options["window_size"][0])
        return loop(q, k, v, case), q.new_empty(0)

    def backward(
        grad: Any, q: Any, k: Any, v: Any, out: Any, _: Any, borders: Any, keys: Any, *more: Any, **at: Any
    ) -> Any:
        case = case_of(q, k, borders, keys, tuple(more[:2]), at["window_size_left"])
        with torch.enable_grad():
            leaves = [states.detach().requires_grad_() for states in (q, k, v)]
            return torch.autograd.grad(loop(*leaves, case), leaves, grad)

    installed = torch_varlen.Varlen(forward, frozenset({"return_aux", "scale", "window_size"}), "lse")
    monkeypatch.setattr(torch_varlen, "load", lambda: installed)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    monkeypatch.setattr(attention, "by_loop", attention.by_varlen)
    *rows, gathered = measure(attention)
    assert gathered["repeats"]
    assert len(rows) == len(attention.cases(smoke=True))
    assert all(error <= 1e-5 for row in rows for error in row["errors"].values())

    def operator(q: Any, k: Any, v: Any, borders: Any, keys: Any, *more: Any, **at: Any) -> Any:
        assert more[2:] == (0.0, True, False)
        assert at["window_size_right"] == 0
        return loop(q, k, v, case_of(q, k, borders, keys, more[:2], at["window_size_left"])), None

    def refused(*_: Any, **at: Any) -> Any:
        raise RuntimeError("Number of heads in key/value must divide\nnumber of heads in query")

    for name in ("interleaved_on_gpu", "wall_times"):
        monkeypatch.setattr(attention, name, lambda calls, rounds: {key: [1.0] * rounds for key in calls})
    run = Run("here", tmp_path, (), "cpu")
    for stand_in in (operator, refused):
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", stand_in)
        attention._compare_operator(run, attention.cases(smoke=True)[6])
    compared, problem = (json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()[-2:])
    assert compared["apart"] == 0.0
    assert problem["said"] == "the operator rejects grouped heads: Number of heads in key/value must divide"


@pytest.mark.parametrize("references", [[], ["cached", "live"]])
def test_the_trainer_is_measured(references: list[str], measure: Measure) -> None:
    from benchmarks.gpu.sections import train

    rows = measure(train, *references)
    assert [row["reference"] for row in rows] == (references or ["cached"])
    for row in rows:
        assert row["steps"] == 6
        assert len(row["steps_ms"]) == row["timed"] == 2
        assert min(row["steps_ms"]) > 0
        assert row["tokens_per_second"] > 0
        assert row["data"] == "synthetic, TOFU's lengths"
        assert row["losses"][-1] < row["losses"][0]
    assert len({row["first_loss"] for row in rows}) == 1


def test_a_failing_trainer_does_not_stop_the_next(measure: Measure) -> None:
    from benchmarks.gpu.sections import train

    rows = measure(train, "frozen", "live", fails="frozen: ValueError")
    assert "problem" in rows[0]
    assert rows[1]["step_ms"] > 0


def test_a_first_loss_that_no_random_model_has_is_wrong(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu.sections import train

    step = train.Trainer.training_step

    def doubled(self: Any, *args: Any) -> Any:
        loss = step(self, *args)
        self.losses[-1] = 2 * loss.detach()
        return loss

    monkeypatch.setattr(train.Trainer, "training_step", doubled)
    measure(train, fails="cached: expected a first loss of about 20.10, got 40.2")


def frame_of(module: str, source: str) -> Callable[..., Any]:
    """Return a function that appears to be in another module."""
    code: CodeType = compile(source, f"{module}.py", "exec")
    names: dict[str, Any] = {"__name__": module, "warnings": warnings}
    exec(code, names)
    function: Callable[..., Any] = names["called"]
    return function


def test_a_wait_is_counted_at_the_line_of_the_library_that_trains(measure: Measure, tmp_path: Path) -> None:
    """torch's warning names a line of torch, or no line."""
    from benchmarks.gpu.section import RESULTS, Run
    from benchmarks.gpu.sections import train

    item = frame_of("torch._tensor", f"def called():\n    warnings.warn({WARNING!r})\n")
    ours = frame_of("efface.hf.train.meter", "\ndef called(inner):\n    inner()\n")
    theirs = frame_of("transformers.trainer", "def called(inner, *more):\n    inner(*more)\n")
    waits = train.Waits()

    def step() -> None:
        with waits.noted():
            for _ in range(3):
                theirs(ours, item)
            theirs(item)
            item()  # as in the thread of a backward pass
            warnings.warn("another", stacklevel=1)

    with pytest.warns(UserWarning, match="another") as seen:
        step()
    assert len(seen) == 1
    assert {(site.place, site.ours): count for site, count in waits.counts.items()} == {
        ("efface.hf.train.meter:3 called", True): 3,
        ("transformers.trainer:2 called", False): 1,
        ("torch._tensor:2 called", False): 1,
    }
    assert {site.operation for site in waits.counts} == {"torch._tensor:2 called"}
    assert warnings.showwarning.__module__ != train.__name__
    run = Run("here", tmp_path, (), "cpu")
    assert train._waits(run, "cached", waits, 3) == [
        "cached: efface waits 1.0 times per step at efface.hf.train.meter:3 called"
    ]
    assert train._waits(run, "cached", waits, 4) == []
    rows = [json.loads(line) for line in (tmp_path / RESULTS).read_text().splitlines()]
    assert [row["waits"] for row in rows] == [3, 1, 1] * 2


def test_torch_warns_in_the_watched_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from benchmarks.gpu.sections.train import Moments

    modes: list[tuple[int, str]] = []
    state = SimpleNamespace(global_step=0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: modes.append((state.global_step, mode)))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.step = state.global_step

        def elapsed_time(self, other: "Event") -> float:
            return 10.0 * (other.step - self.step)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    moments = Moments("cuda", range(4, 6))
    for _ in range(5):
        moments.on_step_begin(None, state, None)
        state.global_step += 1
        moments.on_step_end(None, state, None)
    moments.on_train_end(None, state, None)
    assert modes == [(3, "warn"), (5, "default")]
    assert moments.steps(range(2, 4)) == [10.0, 10.0]
    assert moments.whole(range(2, 4)) == 20.0
