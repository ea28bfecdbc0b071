"""Tests of the step suite: it times only equal computations, in rounds or in blocks, and survives out-of-memory."""

import json
import os
import runpy
import subprocess
import sys
import weakref
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def providers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Make the benchmarks importable, without TOFU and without the provider that compiles, which is slow."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.harness import shared
    from benchmarks.step import providers as module
    from benchmarks.step import suite

    monkeypatch.setattr(shared, "FOLDER", tmp_path / "absent")
    monkeypatch.setattr(suite, "PROVIDERS", tuple(p for p in module.PROVIDERS if p is not module.CutCompiled))
    return module


def kinds(objective: str = "npo") -> list[Any]:
    from benchmarks.step import suite

    return [kind for kind in suite.PROVIDERS if objective in kind.objectives and kind.why_not("cpu") is None]


def only(monkeypatch: pytest.MonkeyPatch, *chosen: Any) -> None:
    from benchmarks.step import suite

    monkeypatch.setattr(suite, "PROVIDERS", chosen)


def measured(shape: str, path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    """Return the record of ``python -m benchmarks step`` with two rounds."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # tests share the cores
    argv = ["benchmarks", "step", "--shape", shape, "--rounds", "2", "--json", str(path), *options]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delitem(sys.modules, "benchmarks.__main__", raising=False)  # runpy warns about an imported module
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("benchmarks", run_name="__main__")
    record: dict[str, Any] = json.loads(path.read_text())
    return record


@pytest.mark.parametrize("blocks", [False, True])
def test_the_smoke_shape_is_measured(blocks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = measured("smoke", tmp_path / "figures.json", monkeypatch, *(["--blocks"] if blocks else []))
    assert record["attention"] == []
    assert [row["provider"] for row in record["step"]] == [kind.name for kind in kinds()]
    assert "padded, Liger, live: its kernels are Triton's, which need a GPU" in record["not_measured"]
    for row in record["step"]:
        assert not row["problem"]
        assert row["loss_backend"] == ("native" if "efface" in row["provider"] else "")
        assert row["error_loss"] <= 1e-5
        assert row["error_gradient"] <= 1e-4
        assert len(row["rounds_ms"]) == 2
        assert 0 < row["median_ms"] < row["whole_median_ms"]
        assert row["real_tokens"] < row["padded_tokens"]
        assert row["parts_ms"]["forward"] > 0
        assert (row["parts_ms"]["reference"] > 0) == (row["reference"] != "cached")
        # two rounds: the median is their mean
        assert sum(row["parts_ms"].values()) == pytest.approx(row["whole_median_ms"])
        assert row["faster_than_live"] > 0
        assert row["faster_than_same"] > 0
        assert row["step_mib"] > 0


@pytest.mark.parametrize("objective", ["npo", "dpo"])
def test_the_shapes_in_a_template_are_measured(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"npo": "smoke, chat", "dpo": "smoke, DPO"}[objective]
    record = measured(shape, tmp_path / "figures.json", monkeypatch, "--without", "LoRA")
    rows = {row["provider"]: row for row in record["step"]}
    assert list(rows) == [kind.name for kind in kinds(objective) if not kind.lora]
    for row in rows.values():
        assert row["chat"]
        assert row["objective"] == objective
        assert not row["problem"]
        assert row["error_loss"] <= 1e-5
        assert row["error_gradient"] <= 1e-4
        assert (row["faster_than_unshared"] is not None) == ("shared" in row["provider"])
    for reference in ("live", "cached"):
        shared, whole = rows[f"efface, shared beginnings, {reference}"], rows[f"efface, {reference}"]
        # 4 or 6 sequences: the template's beginning is not run again, nor are last tokens
        assert shared["tokens_run"] <= whole["tokens_run"] - {"npo": 3 * 36 + 4, "dpo": 5 * 36 + 6}[objective]
        assert whole["tokens_run"] == whole["real_tokens"]
    assert rows["efface, live"]["padded_tokens"] == next(iter(rows.values()))["tokens_run"]
    whole, shared, gather = record["attention"]
    assert shared["tokens"] == gather["tokens"] < shared["keys"] < whole["tokens"] == whole["keys"]
    assert whole["forward_share"] is shared["forward_share"] is None
    assert gather["forward_share"] > 0
    assert gather["backward_share"] > 0


def test_rows_in_llama_3s_template() -> None:
    from benchmarks.step.data import AFTER, BEFORE, BETWEEN, chat_stores

    from efface.batching import added_tokens

    assert (len(BEFORE), len(BETWEEN), len(AFTER)) == (36, 5, 1)
    data = chat_stores(512, alternates=True)
    assert data.alternate is not None
    assert [len(store) for store in data.all] == [400, 3600, 400]
    assert "36 tokens before the question, 5 after it; refusals of" in data.said
    tokens = added_tokens(data.all, share=True, last_tokens=False)
    assert tokens.shared == len(BEFORE)
    for i in (0, 399):
        whole, refused = data.forget[i].tolist(), data.alternate[i].tolist()
        start = int(data.forget.label_starts[i])
        assert whole[:start] == refused[:start]  # the same question
        assert whole[:36] == data.retain[i].tolist()[:36]
        assert max(whole) < 512
        assert whole[-1] == refused[-1] == whole[start - 5]  # the end of a turn
        assert data.forget.label_counts[i] == len(whole) - start
        assert tokens.alternate is not None
        assert tokens.alternate[i] == len(refused) - 1 - start + start // 8  # eight shared tokens count as one
    assert chat_stores(512).alternate is None


def test_refusals_of_tofu_become_alternates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.harness import shared
    from benchmarks.step.data import FORGET, REFUSALS, RETAIN, _tofu_rows, chat_stores

    monkeypatch.setattr(shared, "FOLDER", tmp_path)
    for name in (FORGET, RETAIN):
        (tmp_path / f"{name}.json").write_text(json.dumps({"question": "Who?", "answer": "Somebody else."}) + "\n")
    data = chat_stores(512, alternates=True)
    assert data.said.startswith(f"TOFU {FORGET} / {RETAIN}, in Llama-3's chat template")
    assert data.alternate is not None
    assert data.alternate.label_counts[0] > 5  # without a file of refusals, at least five random tokens and the end
    (tmp_path / REFUSALS).write_text("No.\nNo.\n")
    _tofu_rows.cache_clear()
    data = chat_stores(512, alternates=True)
    assert data.alternate is not None
    assert data.alternate.label_counts[0] == 4  # "N", "o", "." and the end of the turn


def test_a_cpu_without_bf16_instructions_is_timed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.step import inputs, suite

    dtypes = {}
    for flags in ("fma avx2", "fma avx512_bf16", "fma amx_bf16"):
        monkeypatch.setattr(inputs, "processor", lambda flags=flags: {"flags": flags})
        dtypes[flags] = {inputs.SHAPES[name].dtype for name in inputs.timed_on("cpu")}
        assert len(inputs.timed_on("cpu")) == 3
        (quick,) = suite.default_shapes(Namespace(device="cpu", quick=True))
        assert quick.startswith("Llama 8 layers")
    assert dtypes == {
        "fma avx2": {torch.float32},
        "fma avx512_bf16": {torch.bfloat16},
        "fma amx_bf16": {torch.bfloat16},
    }
    monkeypatch.setattr(inputs, "processor", dict)
    assert inputs.multiplies_bf16()


def test_the_memory_of_a_call() -> None:
    from benchmarks.step.measures import peak_mib

    kept = torch.zeros(1 << 18)  # 1 MiB, before the call

    def call() -> torch.Tensor:
        both = torch.cat([kept, kept])
        del both
        return kept + 1

    assert peak_mib(call) == pytest.approx(2.0, abs=0.01)


def test_a_provider_with_another_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch, providers: Any) -> None:
    from benchmarks.step.suite import measure

    loss = providers.EffaceCached.loss
    monkeypatch.setattr(providers.EffaceCached, "loss", lambda self, step: 1.001 * loss(self, step))
    only(monkeypatch, providers.Eager, providers.EffaceCached)
    rows, missing = measure("smoke", 1)
    assert [row.provider for row in rows] == ["padded, two forwards, live"]
    assert "'efface, cached' is not timed: expected" in missing[0]


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch, providers: Any) -> Callable[[float], None]:
    """Return a function that adds a relative error to the eager step's fp32 loss."""
    loss = providers.Eager.loss

    def off_by(error: float) -> None:
        def rounded(self: Any, step: Any) -> Any:
            exact = loss(self, step)
            return exact * (1 + error) if self.trained[0].dtype == torch.float32 else exact

        monkeypatch.setattr(providers.Eager, "loss", rounded)

    return off_by


def test_the_eager_steps_rounding_error_is_allowed_to_others(
    monkeypatch: pytest.MonkeyPatch, providers: Any, rounding: Callable[[float], None]
) -> None:
    from benchmarks.step.inputs import SHAPES
    from benchmarks.step.run import checked, steps_of

    rounding(0.01)
    both = [providers.Eager, providers.EffaceCached]
    steps, _ = steps_of(both, SHAPES["smoke"], "cpu")
    loss = providers.EffaceCached.loss
    monkeypatch.setattr(providers.EffaceCached, "loss", lambda self, step: 1.025 * loss(self, step))
    errors, refused = checked(both, SHAPES["smoke"], "cpu", steps)
    assert refused == []
    assert errors[providers.Eager] == pytest.approx((0.01, 0.01), rel=1e-2)
    assert errors[providers.EffaceCached] == pytest.approx((0.025, 0.025), rel=1e-2)
    # The errors stay the same if the eager step itself is not timed.
    monkeypatch.setattr(providers.EffaceCached, "loss", lambda self, step: 1.035 * loss(self, step))
    errors, refused = checked(both[1:], SHAPES["smoke"], "cpu", steps)
    assert errors == {}
    (reason,) = refused
    assert "expected the eager step's loss within 3.0e-02 and gradients within 3.0e-02, got 3.5e-02 and 3.5" in reason


@pytest.mark.parametrize(("error", "said"), [(0.3, "3.0e-01"), (float("nan"), "inf")])
def test_an_eager_step_that_is_far_off_is_not_timed_and_allows_nothing(
    error: float, said: str, providers: Any, rounding: Callable[[float], None]
) -> None:
    from benchmarks.step.inputs import SHAPES
    from benchmarks.step.run import checked, steps_of

    rounding(error)
    both = [providers.Eager, providers.EffaceCached]
    steps, _ = steps_of(both, SHAPES["smoke"], "cpu")
    errors, refused = checked(both, SHAPES["smoke"], "cpu", steps)
    assert list(errors) == [providers.EffaceCached]
    assert errors[providers.EffaceCached].gradient <= 1e-4
    (reason,) = refused
    assert "'padded, two forwards, live' is not timed: expected errors of at most 0.25" in reason
    assert f"got {said} for the loss and {said} for the gradients" in reason


def test_a_gradient_that_is_nan_is_an_infinite_error(providers: Any) -> None:
    from benchmarks.step.inputs import SHAPES
    from benchmarks.step.run import Gold, errors_of, made, steps_of

    steps = steps_of([providers.EagerCached], SHAPES["smoke"], "cpu")[0][False]
    provider = made(providers.EagerCached, SHAPES["smoke"], "cpu")
    gold = Gold.of(provider, steps)
    assert errors_of(provider, steps, gold) == (0.0, 0.0)
    provider.trained[-1].register_hook(lambda grad: grad * float("nan"))
    assert errors_of(provider, steps, gold) == (0.0, float("inf"))


def test_providers_can_be_left_out(monkeypatch: pytest.MonkeyPatch, providers: Any) -> None:
    from benchmarks.step import suite

    rows, missing = suite.measure("smoke", 1, without=["LoRA", "padded, rows", "cut-cross-entropy", "live"])
    expected = ["padded, two forwards, cached", "efface, cached", "efface, shared beginnings, cached"]
    assert [row.provider for row in rows] == expected
    assert missing == []  # Liger's name contains "live"
    assert all(row.faster_than_live is None and row.faster_than_same > 0 for row in rows)


def test_a_text_that_is_in_no_providers_name_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.__main__ import main

    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    argv = ["benchmarks", "step", "--shape", "smoke", "--without", "LoRA", "--without", "lora"]
    monkeypatch.setattr(sys, "argv", argv)
    assert main() == 2
    said = capsys.readouterr().err
    assert "--without: expected a part of a provider's name, got 'lora'; they are 'padded, two forwards, live" in said


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the CPU look like an H200, and return the calls that a GPU would receive."""
    from benchmarks.step import inputs, run

    asked: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def elapsed_time(self, _other: "Event") -> float:
            return 2.0

    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: asked.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    make = inputs.make_model
    monkeypatch.setattr(run, "make_model", lambda shape, device, *a, **k: make(shape, "cpu", *a, **k))
    monkeypatch.setitem(inputs.SHAPES, inputs.CHECKED_ON_GPU, inputs.SHAPES["smoke"])
    return asked


def test_the_step_suite_as_a_gpu_runs_it(monkeypatch: pytest.MonkeyPatch, providers: Any, gpu: list[str]) -> None:
    """Blocks in ABBA order, memory, utilisation. An out-of-memory error is reported with its size; the rest run."""
    from benchmarks.step import run
    from benchmarks.step.suite import measure

    built: list[str] = []

    class Large(providers.EagerCached):
        """A provider that runs out of memory."""

        name = "large"

        def train(self, step: Any, watch: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 26.12 GiB. GPU 0 has a total capacity")

    class Broken(providers.EagerCached):
        """A provider whose constructor fails."""

        name = "broken"

        def __init__(self, *_: Any) -> None:
            raise RuntimeError("no kernel")

    chosen = (providers.Eager, Large, providers.EffaceLive, providers.EffaceLora, Broken)
    made = run.made
    monkeypatch.setattr(run, "made", lambda kind, *a: (built.append(kind.name), made(kind, *a))[1])
    only(monkeypatch, *chosen)
    seen: list[int] = []
    rows, missing = measure("smoke", 4, "cuda", seen=lambda rows: seen.append(len(rows)))
    assert missing == ["broken: RuntimeError: no kernel"]
    assert [row.provider for row in rows] == [kind.name for kind in chosen[:-1]]
    eager, large, live, lora = rows
    assert large.problem == "out of memory: asked for 26.12 GiB"
    assert large.median_ms is None
    assert seen == [1, 2, 3, 4, 4, 4, 4]  # saved after each block; a failed provider has no second block
    assert built[-7:] == [each.provider for each in (eager, large, live, lora, lora, live, eager)]
    for row in (eager, live, lora):
        assert row.peak_gib == 3.0
        assert len(row.rounds_ms) == 4
        assert row.utilisation is not None
    assert live.whole_faster_than_live == 1.0
    assert lora.whole_faster_than_live is None  # its eager step was not among them
    assert gpu.count("reset_peak_memory_stats") == 7


def test_memory_of_a_failed_provider_is_freed_before_the_next(
    monkeypatch: pytest.MonkeyPatch, providers: Any, gpu: list[str]
) -> None:
    """The traceback of a failure refers to its frames, and they to the models and all activations."""
    from benchmarks.step import run
    from benchmarks.step.suite import measure

    held: list[weakref.ref[Any]] = []

    class Large(providers.EffaceLive):
        """A provider that runs out of memory."""

        name = "large"

        def train(self, step: Any, watch: Any) -> Any:
            with watch.part("loss"):
                loss = self.loss(step)
            self.last = loss  # a reference cycle
            self.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 26.12 GiB.")
            held.extend(map(weakref.ref, (self.policy, self._frozen, loss, self.trained[0])))
            raise self.error from KeyError(loss)

    made, after = run.made, []

    def watched(kind: Any, *arguments: Any) -> Any:
        if held:
            after.append([ref() for ref in held])
            assert gpu[-1] == "reset_peak_memory_stats"
            assert gpu[-2] == "empty_cache"
        return made(kind, *arguments)

    monkeypatch.setattr(run, "made", watched)
    only(monkeypatch, Large, providers.EffaceCached)
    rows, _ = measure("smoke", 2, "cuda")
    assert [row.problem for row in rows] == ["out of memory: asked for 26.12 GiB", ""]
    assert len(held) == 4
    assert after == [[None] * 4] * 2


def test_another_first_loss_is_a_problem(monkeypatch: pytest.MonkeyPatch, providers: Any, gpu: list[str]) -> None:
    """If only a smaller model was checked, the first loss reveals a kernel that fails at the large size."""
    from benchmarks.step.suite import measure

    train = providers.EffaceCached.train
    monkeypatch.setattr(providers.EffaceCached, "train", lambda self, *a: 1.1 * train(self, *a))
    only(monkeypatch, providers.Eager, providers.EffaceCached)
    rows, _ = measure("smoke", 2, "cuda")
    assert [row.problem.split(":")[0] for row in rows] == ["", "wrong loss"]


def test_a_second_block_warms_up_on_the_largest_steps(providers: Any) -> None:
    from types import SimpleNamespace

    from benchmarks.step.run import _warm_up

    sizes = [(30, 90), (50, 60), (10, 80), (40, 70), (20, 100)]
    steps: Any = [SimpleNamespace(batch=SimpleNamespace(tokens=n), padded_tokens=m) for n, m in sizes]
    assert _warm_up(providers.Eager, steps, first=True) == steps
    assert [step.padded_tokens for step in _warm_up(providers.Eager, steps, first=False)] == [100, 90, 80]
    assert [step.batch.tokens for step in _warm_up(providers.EffaceLive, steps, first=False)] == [50, 40, 30]
    assert _warm_up(providers.Eager, steps[:2], first=False) == steps[:2]


def test_without_the_package_that_reads_rows_data_are_made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """TOFU's files exist, but a borrowed machine may lack ``datasets``."""
    from benchmarks.harness import shared
    from benchmarks.step.data import FORGET, RETAIN, stores

    monkeypatch.setattr(shared, "FOLDER", tmp_path)
    for name in (FORGET, RETAIN):
        (tmp_path / f"{name}.json").write_text(json.dumps({"question": "Who?", "answer": name}) + "\n")
    monkeypatch.setitem(sys.modules, "efface.hf.text.data", None)
    forget, retain, data = stores(512)
    assert (len(forget), len(retain)) == (400, 3600)
    assert data.startswith("synthetic, TOFU's lengths (import of efface.hf.text.data")
    monkeypatch.undo()
    monkeypatch.setattr(shared, "FOLDER", tmp_path)
    forget, retain, data = stores(512)
    assert (len(forget), len(retain), data) == (1, 1, "TOFU forget10 / retain90")


def test_the_environment_names_the_folder_of_tofu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = "from benchmarks.harness import shared; print(shared.FOLDER)"
    for value, expected in ((str(tmp_path), tmp_path), ("", ROOT.parent / "shared" / "tofu")):
        environment = {**os.environ, "EFFACE_TOFU": value}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        assert Path(done.stdout.strip()) == expected


def test_every_gpu_shape_is_for_a_gpu() -> None:
    from benchmarks.step.inputs import SHAPES, timed_on

    assert timed_on("cuda") == ["GPU: Llama-3.2-1B, bf16", "GPU: Llama-2-7B, bf16"]
    assert all(SHAPES[name].checkpointing and SHAPES[name].pairs == 8 for name in timed_on("cuda"))


@pytest.mark.parametrize(("name", "weights"), [("GPU: Llama-2-7B, bf16", 6738e6), ("GPU: Llama-3.2-1B, bf16", 1236e6)])
def test_the_models_have_their_sizes(name: str, weights: float) -> None:
    from benchmarks.step.inputs import SHAPES, make_model
    from benchmarks.step.measures import layer_parameters

    config = SHAPES[name].llama()
    model = make_model(SHAPES[name], "meta", 0)
    assert sum(each.numel() for each in model.parameters()) == pytest.approx(weights, rel=1e-3)
    matrices = [w.numel() for n, w in model.named_parameters() if "layers." in n and w.dim() == 2]
    assert layer_parameters(config) == sum(matrices)
    assert {w.dtype for w in model.parameters()} == {torch.bfloat16}


def test_the_flop_of_a_step() -> None:
    from benchmarks.step.data import Stores, synthetic
    from benchmarks.step.inputs import SHAPES, make_model, make_steps
    from benchmarks.step.measures import layer_parameters, model_flop

    shape = SHAPES["smoke"]
    data = Stores(synthetic(8, 512, seed=0), synthetic(8, 512, seed=1), "random")
    (step,) = make_steps(data, make_model(shape, "cpu", 0), pairs=2, count=1)
    config = shape.llama()
    p, head = layer_parameters(config), 512 * 32
    tokens, rows = sum(step.batch.lengths), step.batch.row_offsets[-1]
    forget, forget_rows = sum(step.batch.lengths[:2]), step.batch.row_offsets[2]
    cached = model_flop(config, step.batch, lora=False, reference="cached")
    assert cached == 6 * (p * tokens + head * rows)
    live = model_flop(config, step.batch, lora=False, reference="live")
    assert live - cached == 2 * (p * forget + head * forget_rows)
    assert model_flop(config, step.batch, lora=True, reference="cached") == 4 * (p * tokens + head * rows)


def test_devices_and_messages() -> None:
    from benchmarks.step.measures import peak_flops
    from benchmarks.step.run import asked_for

    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("a toaster") is None
    assert asked_for("CUDA out of memory. Tried to allocate 500.00 MiB. GPU 0") == "500.00 MiB"
    assert asked_for("out of memory") == "an unknown size"


def test_liger_as_a_stand_in(monkeypatch: pytest.MonkeyPatch, providers: Any) -> None:
    """Liger's code path with torch's cross_entropy instead of its kernels. Its RoPE is active only during its own
    steps.
    """
    from benchmarks.step.inputs import SHAPES
    from benchmarks.step.measures import Stopwatch
    from benchmarks.step.run import checked, made, steps_of
    from transformers.models.llama import modeling_llama

    own, used = modeling_llama.apply_rotary_pos_emb, []

    def rope(*arguments: Any, **options: Any) -> Any:
        used.append(1)
        return own(*arguments, **options)

    def apply(model: Any) -> None:
        modeling_llama.apply_rotary_pos_emb = rope

    class Fused(torch.nn.Module):
        def __init__(self, reduction: str) -> None:
            super().__init__()
            assert reduction == "none"

        def forward(self, weight: Any, rows: Any, targets: Any) -> Any:
            return torch.nn.functional.cross_entropy(rows @ weight.T, targets, reduction="none")

    stand_in = ModuleType("liger_kernel.transformers")
    stand_in.apply_liger_kernel_to_llama = apply  # type: ignore[attr-defined]
    stand_in.LigerFusedLinearCrossEntropyLoss = Fused  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    shape = SHAPES["smoke"]
    steps, _ = steps_of([providers.Liger], shape, "cpu")
    errors, refused = checked([providers.Liger], shape, "cpu", steps)
    assert not refused
    assert errors[providers.Liger][1] <= 1e-4
    provider = made(providers.Liger, shape, "cpu")
    assert modeling_llama.apply_rotary_pos_emb is own
    used.clear()
    provider.train(steps[False][0], Stopwatch("cpu"))
    assert used
    assert modeling_llama.apply_rotary_pos_emb is own


def test_cut_cross_entropy_as_a_stand_in(monkeypatch: pytest.MonkeyPatch, providers: Any) -> None:
    from benchmarks.step.inputs import SHAPES
    from benchmarks.step.run import checked, steps_of

    def linear_cross_entropy(
        hidden: Any, weight: Any, labels: Any, *, shift: bool, reduction: str, filter_eps: None, impl: str
    ) -> Any:
        assert shift
        assert filter_eps is None
        assert impl == "cce"
        logits = (hidden[:, :-1] @ weight.T).flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction=reduction)
        return losses.view(len(labels), -1) if reduction == "none" else losses

    stand_in = ModuleType("cut_cross_entropy")
    stand_in.linear_cross_entropy = linear_cross_entropy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", stand_in)
    shape = SHAPES["smoke"]
    steps, _ = steps_of([providers.CutCrossEntropy], shape, "cpu")
    errors, refused = checked([providers.CutCrossEntropy], shape, "cpu", steps)
    assert not refused
    assert errors[providers.CutCrossEntropy][1] <= 1e-4
