"""A run that evaluates itself on TOFU: the figures are those of the models it had, on any number of processes."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from efface.evaluate import TofuEvaluation, tofu
from support.processes import RANKS, launch
from support.ranks.evaluated_run import main
from support.tofu_helpers import model_of, tokenizer_of, write_rows

COUNTS = {"forget": 6, "retain": 5, "real_authors": 5, "world_facts": 4}


@pytest.fixture(scope="module")
def folder(tofu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_rows(tofu, folder / "tofu", COUNTS)
    return with_retain_log(folder)


def with_retain_log(folder: Path) -> Path:
    tokenizer = tokenizer_of(folder / "tofu")
    tofu(model_of(tokenizer, seed=1), tokenizer, folder / "tofu", output=folder / "retain", splits=["forget"])
    return folder


def test_figures_are_of_the_models_that_the_run_had(folder: Path, tmp_path: Path) -> None:
    main(folder, tmp_path)
    logs = json.loads((tmp_path / "rank0.json").read_text())["logs"]
    assert [log["step"] for log in logs] == [0, 2, 4]
    assert logs[0]["forget_Q_A_Prob"] != logs[2]["forget_Q_A_Prob"]
    tokenizer = tokenizer_of(folder / "tofu")
    evaluate = TofuEvaluation(tokenizer, folder / "tofu", retain_log=folder / "retain" / "TOFU_EVAL.json")
    start = evaluate(model_of(tokenizer))
    assert {name: logs[0][name] for name in start} == pytest.approx(start, rel=1e-5)
    # the best of them, as it was saved
    best = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    kept = evaluate(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "best"))
    assert {name: best["figures"][name] for name in kept} == pytest.approx(kept, rel=1e-5)


@pytest.mark.slow
def test_two_processes_evaluate_the_run_as_one_does(folder: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        done = launch(processes, [str(RANKS / "evaluated_run.py"), str(folder), str(out)])
        assert done.returncode == 0, done.stderr[-4000:]
    (alone,), ranks = (
        [json.loads((tmp_path / str(count) / f"rank{rank}.json").read_text()) for rank in range(count)]
        for count in (1, 2)
    )
    shares = [len(rank["batches"]) for rank in ranks]
    assert sum(shares) == len(alone["batches"])
    assert min(shares) > 0.4 * sum(shares)
    assert ranks[0]["logs"] == ranks[1]["logs"]
    for mine, theirs in zip(ranks[0]["logs"], alone["logs"], strict=True):
        for name in ("forget_quality", "model_utility", "forget_Q_A_Prob", "ra_Q_A_ROUGE", "wf_Truth_Ratio"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
