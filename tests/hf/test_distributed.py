"""Runs on several processes (gloo, CPU) against the run on one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from support.helpers import saved_llama, written_rows
from support.processes import RANKS, launch


def run(out: Path, *, processes: int, reference: str, token_budget: int) -> list[dict[str, Any]]:
    out.mkdir()
    words = [str(RANKS / "distributed_run.py"), str(out), reference, str(token_budget)]
    done = launch(processes, words)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run on one process, in one forward pass a step; all others have to follow it."""
    (record,) = run(tmp_path_factory.mktemp("alone") / "out", processes=1, reference="cached", token_budget=4096)
    assert len(record["losses"]) == 24
    assert abs(record["losses"][-1] - record["losses"][0]) > 0.05 * record["losses"][0]
    return record


@pytest.mark.slow
@pytest.mark.parametrize(("reference", "token_budget"), [("cached", 4096), ("live", 40)])
def test_two_processes_follow_the_run_on_one(
    reference: str, token_budget: int, alone: dict[str, Any], tmp_path: Path
) -> None:
    """The same losses and weights. A small budget makes several micro-batches, whose gradients are exchanged once."""
    ranks = run(tmp_path / "two", processes=2, reference=reference, token_budget=token_budget)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name, weight in alone["weights"].items():
            # Adam moved them by up to 0.024: 24 steps of 1e-3
            assert flat(rank["weights"][name]) == pytest.approx(flat(weight), rel=1e-4, abs=1e-4), name
    assert ranks[0]["weights"] == ranks[1]["weights"]
    for mine, theirs in zip(alone["logs"], ranks[0]["logs"], strict=True):
        for name in ("loss", "forget_loss", "retain_loss", "grad_norm"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4), name


@pytest.mark.slow
def test_a_process_without_a_share_of_the_last_step_keeps_up(alone: dict[str, Any], tmp_path: Path) -> None:
    """20 rows in steps of 6 leave 2 pairs, 4 sequences, for 5 processes."""
    ranks = run(tmp_path / "five", processes=5, reference="cached", token_budget=4096)
    assert ranks[4]["losses"] == pytest.approx(alone["losses"], rel=1e-5)


@pytest.mark.slow
def test_other_objectives_follow_the_run_on_one(tmp_path: Path) -> None:
    """Pairs, live distributions, logits, activations; 7 rows in steps of 3 leave one of 3 processes without a share."""
    records = []
    for processes in (1, 3):
        out = tmp_path / str(processes)
        out.mkdir()
        done = launch(processes, [str(RANKS / "distributed_objectives.py"), str(out)])
        assert done.returncode == 0, done.stderr[-4000:]
        records.append(json.loads((out / f"rank{processes - 1}.json").read_text()))
    alone, three = records
    for objective, record in alone.items():
        for mine, theirs in zip(record["logs"], three[objective]["logs"], strict=True):
            for name in {"loss", "forget_loss", "retain_loss", "retain_preference", "mean_log_ratio"} & mine.keys():
                assert theirs[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-4), (objective, name)
        for name, weight in record["weights"].items():
            got = three[objective]["weights"][name]
            assert flat(got) == pytest.approx(flat(weight), rel=1e-4, abs=2e-4), (objective, name)  # of 0.006 by Adam


@pytest.mark.slow
def test_the_command_on_two_processes_writes_one_model(tmp_path: Path) -> None:
    saved_llama(tmp_path / "model")
    data = written_rows(tmp_path / "rows.json")
    words = [
        "-m",
        "efface",
        "unlearn",
        "--model",
        str(tmp_path / "model"),
        "--forget",
        str(data),
        "--retain",
        str(data),
    ]
    words += [
        "--output_dir",
        str(tmp_path / "out"),
        "--use_cpu",
        "True",
        "--pairs_per_step",
        "2",
        "--num_train_epochs",
        "1",
        "--save_schedule",
        "2",
        "--ddp_timeout",
        "120",
    ]
    done = launch(2, words)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("wrote ") == 1
    assert done.stderr.count(": 3 steps") == 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0
    assert not list((tmp_path / "out").glob(".partial-*"))
    again = launch(2, [str(RANKS / "command_rank.py"), *words[2:]])
    assert again.returncode != 0
    assert "is not empty; choose another" in again.stderr

    # As if it had been killed after step 2: both ranks go on from there, to the same bits.
    out = tmp_path / "out"
    whole = (out / "model.safetensors").read_bytes()
    assert {path.name for path in (out / "checkpoint-2").glob("*_1.*")} == {"rng_state_1.pth", "progress_1.pt"}
    (out / "model.safetensors").unlink()
    shutil.rmtree(out / "checkpoint-3")
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "finished": False}))
    done = launch(2, [str(RANKS / "command_rank.py"), *words[2:]])
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count(f"continuing from {out / 'checkpoint-2'}") == 1
    assert (out / "model.safetensors").read_bytes() == whole


def flat(values: Any) -> list[float]:
    return [x for value in values for x in flat(value)] if isinstance(values, list) else [values]
