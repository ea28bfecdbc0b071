"""Tests of the meter's metrics against padded forward passes, and of the cost of logging them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from efface import DPO, NPO, UNDIAL, GradDiff, SimNPO, UnlearnTrainer
from efface.batching import TokenStore, pack, pack_store
from efface.hf.model.head_loss import StepOutput
from efface.hf.train.meter import PHASES, PhaseClock, StepMeter, padded_tokens, peak_memory_gib
from support.helpers import arguments, padded, random_store, sequence, tiny_llama
from support.padded_loop import Losses, batch_nll

FORGET, RETAIN = random_store(8, seed=1), random_store(20, seed=2)


def logs_of(folder: Path, *, objective: Any, model: Any = None, **settings: Any) -> list[dict[str, float]]:
    logged = Losses()
    options = {name: settings.pop(name) for name in ("reference", "reference_model") if name in settings}
    UnlearnTrainer(
        tiny_llama() if model is None else model,
        arguments(folder, **settings),
        forget=FORGET,
        retain=RETAIN,
        objective=objective,
        callbacks=[logged],
        **options,
    ).train()
    return [log for log in logged.logs if "loss" in log]


@pytest.mark.parametrize("reference", ["cached", "live"])
@pytest.mark.parametrize("token_budget", [4096, 30])
def test_figures_equal_those_of_padded_passes(reference: str, token_budget: int, tmp_path: Path) -> None:
    model, other = tiny_llama(), tiny_llama(seed=7, initializer_range=0.2)
    everything = padded(FORGET, list(range(8)))
    labels = (everything[1][:, 1:] != -100).sum(-1)
    with torch.no_grad():
        sums, reference_sums = -batch_nll(model, everything), -batch_nll(other, everything)
    settings = {"reference": reference, "reference_model": other, "per_device_train_batch_size": 8}
    (log,) = logs_of(tmp_path, objective=NPO(beta=0.2), model=model, token_budget=token_budget, **settings)
    ratio = sums - reference_sums
    assert log["mean_log_ratio"] == pytest.approx(ratio.mean().item(), rel=1e-4)
    assert log["npo_weight"] == pytest.approx((2 * torch.sigmoid(0.2 * ratio)).mean().item(), rel=1e-4)
    assert log["forget_probability"] == pytest.approx((sums / labels).exp().mean().item(), rel=1e-4)
    assert 0 < log["retain_probability"] < 1


def test_npos_weight_is_what_it_multiplies_gradient_ascent_by(tmp_path: Path) -> None:
    """At the start it is 1: policy = reference, so 2 σ(0)."""
    log = logs_of(tmp_path, objective=NPO())[0]
    assert log["mean_log_ratio"] == pytest.approx(0.0, abs=1e-4)
    assert log["npo_weight"] == pytest.approx(1.0, rel=1e-5)


def test_figures_that_an_objective_has_not_are_absent(tmp_path: Path) -> None:
    for objective in (SimNPO(), GradDiff()):
        for log in logs_of(tmp_path, objective=objective):
            assert {"forget_probability", "retain_probability", "forget_loss", "retain_loss"} <= log.keys()
            assert not {"mean_log_ratio", "npo_weight"} & log.keys()
    log = logs_of(tmp_path, objective=SimNPO(alpha=0.0))[0]
    assert not {"retain_probability", "retain_loss"} & log.keys()


def output_of(sums: torch.Tensor) -> StepOutput:
    return StepOutput(torch.zeros(()), torch.ones(len(sums)), sums, torch.zeros(len(sums)))


def test_sequences_without_log_probabilities_do_not_count() -> None:
    """UNDIAL computes no log-probabilities of forget sequences, so only the retain sequence counts."""
    meter, batch = StepMeter(), pack(FORGET, RETAIN, [0, 1], [2])
    meter.add(batch, output_of(torch.tensor([torch.nan, torch.nan, -1.0])), UNDIAL(alpha=1.0))
    meter.on_step_end(None, None, None)  # type: ignore[arg-type]
    figures = meter.read()
    assert "forget_probability" not in figures
    labels = batch.row_offsets[3] - batch.row_offsets[2]
    assert figures["retain_probability"] == pytest.approx(math.exp(-1 / labels))
    assert all(math.isfinite(value) for value in figures.values())
    assert meter.read() == {}


def test_a_mean_over_no_sequence_is_absent_and_never_nan() -> None:
    meter, batch = StepMeter(), pack(FORGET, RETAIN, [], [2, 3])
    meter.add(batch, output_of(-torch.ones(2)), NPO())
    meter.on_step_end(None, None, None)  # type: ignore[arg-type]
    figures = meter.read()
    assert not {"forget_probability", "mean_log_ratio", "npo_weight"} & figures.keys()
    assert all(math.isfinite(value) for value in figures.values())


def test_figures_of_two_ranks_are_one_mean() -> None:
    """Rank 0 has one forget sequence, rank 1 three: the mean is over four, the peak memory that of the larger rank."""
    meter, batch = StepMeter(), pack(FORGET, RETAIN, [0], [])
    meter.add(batch, output_of(torch.tensor([-2.0])), DPO(alpha=0.0))
    meter.on_step_end(None, None, None)  # type: ignore[arg-type]
    names = ["forget_loss", "forget_probability", "forget_probability count", "mean_log_ratio", "mean_log_ratio count"]

    def gather(figures: torch.Tensor) -> torch.Tensor:
        assert figures.shape == (5 + len(PHASES) + len(names),)
        other = figures.clone()
        other[4] = 1e6
        other[-5:] = torch.tensor([3.0, 1.5, 3.0, -30.0, 3.0])
        return torch.stack([figures, other])

    figures = meter.read(gather)
    assert figures["mean_log_ratio"] == pytest.approx(-8.0)
    assert figures["forget_loss"] == pytest.approx(4.0)
    assert figures["peak_memory_gib"] == 1e6


def test_padding_saved_is_that_of_the_padded_batches(tmp_path: Path) -> None:
    batch = pack(FORGET, RETAIN, [0, 1, 2], [3, 4])
    expected = sum(padded(store, index)[0].numel() for store, index in ((FORGET, [0, 1, 2]), (RETAIN, [3, 4])))
    assert padded_tokens(batch) == expected
    meter = StepMeter()
    meter.add(batch, output_of(-torch.ones(5)), None)
    meter.on_step_end(None, None, None)  # type: ignore[arg-type]
    real = sum(len(sequence(s, i)[0]) for s, i in ((FORGET, 0), (FORGET, 1), (FORGET, 2), (RETAIN, 3), (RETAIN, 4)))
    assert meter.read()["padding_saved"] == pytest.approx(1 - real / expected, abs=1e-4)


@pytest.mark.parametrize("last_tokens", [True, False])
def test_prefixes_saved_is_the_share_of_the_tokens_that_are_not_run(last_tokens: bool) -> None:
    store = TokenStore.from_sequences([[1, 2, 3, 4, 5], [1, 2, 3, 6], [7, 8]], [3, 3, 1])
    batch = pack_store(store, np.arange(3), share=True, last_tokens=last_tokens)
    other = pack_store(store, np.array([2]), share=True, last_tokens=last_tokens)
    meter = StepMeter()
    meter.add(batch, output_of(-torch.ones(3)), None)
    meter.add(other, output_of(-torch.ones(1)), None)
    meter.on_step_end(None, None, None)  # type: ignore[arg-type]
    state = meter.state_dict()
    figures = meter.read()
    # Without last tokens, the second sequence is 1, 2, 3, and keeps its 3.
    assert figures["prefixes_saved"] == pytest.approx(3 / 13 if last_tokens else 2 / 9, abs=1e-4)
    assert figures["padding_saved"] == pytest.approx(1 - 13 / 17, abs=1e-4)  # a token that is shared counts as usual
    assert meter.tokens == 13
    resumed = StepMeter()
    resumed.load_state_dict(state)
    assert resumed.tokens == 13
    meter.add(other, output_of(-torch.ones(1)), None)
    meter.on_step_end(None, None, None)  # type: ignore[arg-type]
    assert "prefixes_saved" not in meter.read()  # nothing was shared since the last reading


def test_shares_of_time_and_memory(tmp_path: Path) -> None:
    for log in logs_of(tmp_path, objective=NPO(), token_budget=30):
        shares = [log[f"time_{phase}"] for phase in PHASES]
        assert all(0 <= share <= 1 for share in shares)
        assert sum(shares) == pytest.approx(1, abs=1e-3)
        assert log["time_forward"] > 0
        assert log["time_backward"] > 0
        assert log["peak_memory_gib"] > 0.01
    assert peak_memory_gib(torch.device("cpu")) < 1024  # in GiB, not KiB


def test_a_clock_gives_time_to_the_phase_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = PhaseClock()
    clock.end("data")  # without a mark
    now = iter([10.0, 11.0, 13.0, 20.0, 24.0])
    monkeypatch.setattr("efface.hf.train.meter.time.perf_counter", lambda: next(now))
    clock.begin(torch.device("cpu"))
    clock.end("forward")
    clock.end("backward")
    clock.begin(torch.device("cpu"))
    clock.end("forward")
    assert clock.read() == {"forward": 5.0, "backward": 2.0, "optimizer": 0.0, "data": 0.0}
    assert not any(clock.read().values())


def test_trackers_get_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs_of(tmp_path, objective=NPO(), report_to="tensorboard", max_steps=3)
    (event,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(event.parent))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    wanted = {"forget_loss", "npo_weight", "mean_log_ratio", "padding_saved", "time_forward", "peak_memory_gib"}
    assert {f"train/{name}" for name in wanted} <= tags
    assert [scalar.step for scalar in events.Scalars("train/npo_weight")] == [1, 2, 3]


def test_figures_of_another_version_are_not_taken_up() -> None:
    meter = StepMeter()
    state = meter.state_dict()
    meter.load_state_dict({**state, "tokens": 10, "seconds": 3.0, "_seconds": 3.0})  # keys of 0.1.0's first checkpoints
    assert (meter.tokens, meter.seconds) == (0, 0.0)
    meter.load_state_dict({**state, "tokens": 10})
    assert meter.tokens == 10


def test_tokens_per_second_are_by_the_clock_of_the_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on the device, not on the host, which runs ahead; without waiting for data; the slowest rank counts."""
    meter, batch = StepMeter(), pack(FORGET, RETAIN, [0, 1], [2])
    read = [{"forward": 1.0, "backward": 2.0, "optimizer": 0.5, "data": 100.0}]
    nothing = dict.fromkeys(PHASES, 0.0)
    monkeypatch.setattr(meter.clock, "read", lambda: read.pop() if read else nothing)
    meter.add(batch, output_of(-torch.ones(3)), None)
    meter.on_step_end(None, None, None)  # type: ignore[arg-type]
    assert meter.seconds == 3.5
    resumed = StepMeter()
    resumed.load_state_dict(meter.state_dict())  # a checkpoint between two logs keeps the time as well
    assert resumed.seconds == 3.5

    def gather(figures: torch.Tensor) -> torch.Tensor:
        slower = figures.clone()
        slower[5 + PHASES.index("forward")] = 4.0
        return torch.stack([figures, slower])

    for each in (meter, resumed):
        assert each.read(gather)["tokens_per_second"] == pytest.approx(2 * batch.tokens / 6.5, abs=0.1)
        assert each.seconds == 3.5
