"""Tests of sweeps: the search space, each trial once despite kills, one reference, the ranking, what is kept."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from efface.cli import sweep as sweep_command
from efface.cli.main import main
from efface.cli.sweep import run_trial
from efface.sweep import (
    Floor,
    Ledger,
    Place,
    Trial,
    best_of,
    load_preset,
    parse_grid,
    parse_space,
    point_name,
    points,
    ranked,
)
from efface.sweep.ranking import objective
from efface.sweep.results import Result
from efface.sweep.settings import parse_sweep
from support.helpers import TEXTS, saved_llama

pytest.importorskip("optuna", reason="needs Optuna: pip install 'efface[sweep]'")


class Killed(BaseException):
    """An exception that no code catches, so that the state left behind is that of SIGKILL."""


class Ended:
    """A finished trial that ran in this process."""

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code

    def stop(self) -> None:
        pass


class Quick:
    """A launcher of trials without a model, whose metrics are computed by a function."""

    def __init__(self, figures: Callable[[dict[str, str]], Any], killed_at: Sequence[int] = ()) -> None:
        self.figures, self.killed_at = figures, set(killed_at)
        self.started: list[str] = []
        self.finished: list[str] = []
        self.environments: list[Mapping[str, str]] = []
        self.words: list[list[str]] = []

    def __call__(self, words: Sequence[str], log: Path, environment: Mapping[str, str], lock: int) -> Ended:
        given = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
        given = {name.replace("-", "_"): value for name, value in given.items()}
        folder = Path(given["output_dir"])
        self.started.append(folder.name)
        self.environments.append(environment)
        self.words.append(list(words))
        if len(self.started) in self.killed_at:
            raise Killed
        (folder / "evaluation").mkdir(parents=True, exist_ok=True)
        said = self.figures(given)
        log.write_text("loading\nCUDA out of memory\n")
        self.finished.append(folder.name)
        if isinstance(said, int):
            return Ended(said)
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "checkpoint-3").mkdir(exist_ok=True)
        (folder / "evaluation" / "TOFU_SUMMARY.json").write_text(json.dumps(said))
        return Ended(0)


class Filled:
    """Counts how often the reference is computed."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, words: Sequence[str], log: Path) -> int:
        self.calls.append(list(words))
        log.write_text("2 sequences computed, 0 already cached\n")
        return 0


def sweep(out: Path, launch: Any, *words: str, fill: Filled | None = None, recipe: str = "tofu-npo") -> int:
    parsed = parse_sweep(["--recipe", recipe, "--use_cpu", "True", "--output_dir", str(out), *words])
    return sweep_command.carry_out(parsed, launch, fill or Filled(), Console(stderr=True))


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def good(given: Mapping[str, str]) -> dict[str, float]:
    """Forget quality grows with beta; model utility falls with the learning rate."""
    return {"forget_quality": float(given["beta"]), "model_utility": 0.6 - 1000 * float(given["learning_rate"])}


GRID = ("--grid", "learning_rate=1e-5,2e-5,5e-5", "beta=.05,.1,.5,.9")
SMALL = ("--grid", "learning_rate=1e-5", "beta=.05,.1,.5,.9")


def test_the_grid_of_the_audit() -> None:
    grid = list(points(load_preset("audit-54")))
    assert len(grid) == 54
    assert len({point_name(point) for point in grid}) == 54
    assert {point["learning_rate"] for point in grid} == {1e-5, 2e-5, 5e-5}
    assert {point["beta"] for point in grid} == {0.05, 0.1, 0.5}
    assert {point["alpha"] for point in grid} == {1.0, 2.0, 5.0}
    assert {point["num_train_epochs"] for point in grid} == {5.0, 10.0}


def test_names_of_points_differ_and_are_fit_for_folders() -> None:
    assert point_name({"learning_rate": 1e-5, "beta": 0.1}) == "learning_rate=1e-05,beta=0.1"
    near = [point_name({"beta": value}) for value in (0.1, 0.1 + 1e-12, 0.1 + 2e-12)]
    assert len(set(near)) == 3
    assert "/" not in point_name({"model": "org/name"})
    assert point_name({"model": "org/name"}) != point_name({"model": "org_name"})
    assert len(point_name({"model": "m" * 500})) < 200
    assert point_name({"beta": True}) == "beta=True"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "learning_rat=1e-5"], "got 'learning_rat'; did you mean 'learning_rate'?"),
        (["--grid", "learning_rate=fast"], "invalid float value: 'fast'"),
        (["--grid", "learning_rate=1e-5,"], "invalid float value: ''"),
        (["--grid", "learning_rate=1e-5,0.00001"], "expected values that differ, got 1e-05 twice"),
        (["--grid", "learning_rate=nan"], "expected a number, got 'nan'"),
        (["--grid", "beta=.1", "beta=.2"], "expected each flag once, got beta twice"),
        (["--grid", "beta"], "expected flag=values, such as learning_rate=1e-5,2e-5, got 'beta'"),
        (["--grid", "forget_filter=a=1"], "expected a flag with one value"),
        (["--grid", "output_dir=a,b"], "output_dir cannot be varied"),
        (["--grid", "objective=npo,np"], "np"),
        (["--grid", "beta=.1", "--beta", ".2"], "--beta: expected either a value for all trials or varied values"),
        (["--grid", "beta=.1", "--preset", "audit-54"], "got --grid and --preset"),
        (["--grid", "beta=.1", "--trials", "3"], "got grid, which runs every point once"),
        (["--grid", "beta=.1", "--workers", "0"], "--workers: expected 1 or more, got 0"),
        (["--grid", "beta=.1", "--floor", "2"], "--floor: expected a share"),
        (["--grid", "beta=.1", "--push_to_hub", "True"], "push the best model"),
        (["--grid", "beta=.1", "--evaluation", "--split forget10"], "expected no recipe with its own evaluation"),
        (["--grid", "beta=.1", "--nonsense", "1"], "unknown arguments --nonsense 1"),
        ([], "expected one of --grid, --preset and --space"),
        (["--preset", "audit-55"], "did you mean 'audit-54'?"),
        (["--space", "beta=log:0:1", "--trials", "3"], "expected 0 < LOW < HIGH, got 0:1"),
        (["--space", "beta=float:1", "--trials", "3"], "expected float:LOW:HIGH"),
        (["--space", "num_train_epochs=int:1.5:3", "--trials", "3"], "with numbers, got int:1.5:3"),
        (["--space", "beta=uniform:0:1", "--trials", "3"], "float:LOW:HIGH, log:LOW:HIGH"),
        (["--space", "beta=float:0.1:1"], "expected --trials"),
        (["--space", "beta=float:0.1:1", "--sampler", "grid"], "got a range of beta"),
        (["--space", "beta=float:0.1:1", "--trials", "3", "--evaluate", "False"], "expected evaluated trials"),
    ],
)
def test_wrong_use_is_explained(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["sweep", "--recipe", "tofu-npo", "--output_dir", str(out), *words]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_conflicting_settings_are_found_before_anything_runs(tmp_path: Path) -> None:
    words = ["--recipe", "tofu-graddiff", "--output_dir", str(tmp_path / "out"), "--grid", "beta=.1,.5"]
    with pytest.raises((TypeError, ValueError), match="beta"):
        parse_sweep(words)


def test_twelve_trials_killed_twice_are_each_done_once(tmp_path: Path) -> None:
    launch, fill = Quick(good, killed_at=(4, 9)), Filled()
    for _ in range(2):
        with pytest.raises(Killed):
            sweep(tmp_path, launch, *GRID, fill=fill)
    assert sweep(tmp_path, launch, *GRID, fill=fill) == 0
    assert len(launch.finished) == len(set(launch.finished)) == 12
    assert len(launch.started) == 14  # the two killed trials are started again
    assert len(fill.calls) == 1
    found = rows(tmp_path)
    assert len(found) == 12
    assert [row["rank"] for row in found] == [str(k) for k in range(1, 13)]
    assert [float(row["beta"]) for row in found[:3]] == [0.9] * 3
    assert sweep(tmp_path, launch, *GRID, fill=fill) == 0
    assert len(launch.started) == 14
    assert len(fill.calls) == 1


@pytest.mark.parametrize("where", ["before finish", "before tell", "before ask", "after ask"])
def test_a_kill_between_writing_and_recording_a_result(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments at which a result is stored in one place and not yet in the other."""
    import optuna

    launch, count = Quick(good), 0

    def at_third(call: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            result = call(*args, **options) if after else None
            if count == 3:
                raise Killed
            return result if after else call(*args, **options)

        return counted

    target, name = {
        "before finish": (Place, "finish"),
        "before tell": (Ledger, "tell"),
        "before ask": (optuna.Study, "ask"),
        "after ask": (optuna.Study, "ask"),
    }[where]
    with monkeypatch.context() as patched:
        patched.setattr(target, name, at_third(getattr(target, name), after=where == "after ask"))
        with pytest.raises(Killed):
            sweep(tmp_path, launch, *SMALL)
    assert sweep(tmp_path, launch, *SMALL) == 0
    # its process had ended, but the trial is not recorded; `unlearn` itself detects the finished run
    repeated = 1 if where == "before finish" else 0
    assert len(launch.finished) == 4 + repeated
    assert len(set(launch.finished)) == len(rows(tmp_path)) == 4
    assert {row["state"] for row in rows(tmp_path)} == {"complete"}


def test_failures_are_kept_and_tried_again_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = True

    def figures(given: Mapping[str, str]) -> Any:
        if float(given["beta"]) > 0.4 and broken:
            return {"0.5": 1, "0.9": 3}[given["beta"]]
        return good(given)

    launch = Quick(figures)
    grid = ("--grid", "learning_rate=1e-5", "beta=.1,.5,.9,.2")
    assert sweep(tmp_path, launch, *grid) == 0
    failed = [row for row in rows(tmp_path) if row["state"] == "failed"]
    assert [row["exit_code"] for row in failed] == ["1", "3"]
    assert failed[0]["error"] == "loading\nCUDA out of memory"
    shown = capsys.readouterr()
    assert "diverged" in shown.out
    assert "CUDA out of memory" in shown.err
    assert sweep(tmp_path, launch, *grid) == 0
    assert len(launch.started) == 4
    broken = False
    assert sweep(tmp_path, launch, *grid, "--retry_failed") == 0
    assert launch.started[4:] == ["learning_rate=1e-05,beta=0.5", "learning_rate=1e-05,beta=0.9"]
    assert [row["state"] for row in rows(tmp_path)] == ["complete"] * 4


def test_a_sweep_in_which_all_fail_says_so(tmp_path: Path) -> None:
    assert sweep(tmp_path, Quick(lambda given: -9), *SMALL) == 1
    assert {row["exit_code"] for row in rows(tmp_path)} == {"-9"}
    assert not (tmp_path / "best.json").exists()


@pytest.mark.parametrize("content", [{"forget_quality": float("nan")}, [], "no"])
def test_a_trial_without_figures_has_failed(content: Any, tmp_path: Path) -> None:
    sweep(tmp_path, Quick(lambda given: content), "--grid", "beta=.1")
    assert rows(tmp_path)[0]["state"] == "failed"
    assert rows(tmp_path)[0]["error"]


def test_other_settings_are_another_sweep(tmp_path: Path) -> None:
    sweep(tmp_path, Quick(good), "--grid", "learning_rate=1e-5", "beta=.1,.2")
    with pytest.raises(FileExistsError, match=r"space.beta: was \[0.1, 0.2\], is \[0.1, 0.3\]"):
        sweep(tmp_path, Quick(good), "--grid", "learning_rate=1e-5", "beta=.1,.3")
    with pytest.raises(FileExistsError, match=r"seed: was 0, is 1"):
        sweep(tmp_path, Quick(good), "--grid", "learning_rate=1e-5", "beta=.1,.2", "--seed", "1")
    assert sweep(tmp_path, Quick(good), "--grid", "learning_rate=1e-5", "beta=.1,.2", "--floor", ".5") == 0


def test_other_data_under_the_same_path_is_another_sweep(tmp_path: Path) -> None:
    data = tmp_path / "tofu"
    data.mkdir()
    for name in ("forget10", "retain90", "forget10_perturbed"):
        (data / f"{name}.json").write_text(json.dumps(TEXTS))
    words = ("--grid", "learning_rate=1e-5", "beta=.1,.2", "--data", str(data))
    assert sweep(tmp_path / "out", Quick(good), *words, recipe="tofu-npo") == 0
    assert sweep(tmp_path / "out", Quick(good), *words, recipe="tofu-npo") == 0
    for name in ("forget10", "forget10_perturbed"):
        path = data / f"{name}.json"
        before, times = path.read_text(), path.stat()
        path.write_text(before.replace("Aiko", "Bram"))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(FileExistsError, match=rf"Differences: content\.\S*/{name}\.json: was '\w+', is '\w+'$"):
            sweep(tmp_path / "out", Quick(good), *words, recipe="tofu-npo")
        path.write_text(before)


def test_only_the_best_model_stays(tmp_path: Path) -> None:
    def models(out: Path) -> list[str]:
        return sorted(path.parent.name for path in out.glob("trials/*/model.safetensors"))

    grid = ("--grid", "learning_rate=1e-5", "beta=.1,.9,.5", "--min_utility", ".1")
    sweep(tmp_path / "best", Quick(good), *grid)
    assert models(tmp_path / "best") == ["learning_rate=1e-05,beta=0.9"]
    best = json.loads((tmp_path / "best" / "best.json").read_text())
    assert best["parameters"] == {"learning_rate": 1e-5, "beta": 0.9}
    assert best["model"] == best["folder"]
    assert "--beta=0.9" in best["command"]
    sweep(tmp_path / "all", Quick(good), *grid, "--keep", "all")
    assert len(models(tmp_path / "all")) == 3
    sweep(tmp_path / "none", Quick(good), *grid, "--keep", "none")
    assert models(tmp_path / "none") == []
    assert not list((tmp_path / "none").glob("trials/*/checkpoint-*"))
    assert len(list((tmp_path / "none").glob("trials/*/evaluation/TOFU_SUMMARY.json"))) == 3
    assert json.loads((tmp_path / "none" / "best.json").read_text())["model"] is None


def test_ranking_by_quality_above_the_floor() -> None:
    def trial(number: int, quality: float | None, utility: float | None, state: str = "complete") -> Trial:
        figures = {"forget_quality": quality, "model_utility": utility}
        return Trial(number, str(number), {}, state, {k: v for k, v in figures.items() if v is not None})

    trials = [
        *(trial(0, 0.9, 0.1), trial(1, 0.2, 0.6), trial(2, 0.3, 0.55), trial(3, None, 0.6)),
        *(trial(4, 0.0, 0.6), trial(5, None, None, "failed"), trial(6, None, None, "waiting")),
    ]
    assert [each.number for each in ranked(trials, Floor(0.9))] == [2, 1, 4, 0, 3, 6, 5]
    assert [each.number for each in ranked(trials, Floor(0.9, full=0.65))][:2] == [1, 4]  # 0.55 < 0.585
    assert ranked(trials, Floor(least=0.05))[0].number == 0
    best = best_of(trials, Floor(0.9))
    assert best is not None
    assert best.number == 2
    assert best_of(trials[5:], Floor()) is None


def test_the_value_that_optuna_maximises() -> None:
    def value(quality: float, utility: float) -> float:
        return objective({"forget_quality": quality, "model_utility": utility}, 0.5)

    assert value(0.01, 0.6) == pytest.approx(-2)
    order = [value(0.9, 0.1), value(0.9, 0.4), value(0.0, 0.6), value(5e-324, 0.6), value(1e-30, 0.5), value(0.9, 0.5)]
    assert order == sorted(order)
    assert len(set(order)) == len(order)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_draws_are_counted_and_continued(sampler: str, tmp_path: Path) -> None:
    space = (
        "--space",
        "learning_rate=log:1e-6:1e-4",
        "beta=float:0.01:1",
        "alpha=choice:1,2",
        "num_train_epochs=int:3:5",
    )
    launch = Quick(good, killed_at=(3,))
    with pytest.raises(Killed):
        sweep(tmp_path, launch, *space, "--sampler", sampler, "--trials", "5")
    for trials in (5, 5, 7):
        assert sweep(tmp_path, launch, *space, "--sampler", sampler, "--trials", str(trials)) == 0
        assert len(launch.finished) == len(set(launch.finished)) == len(rows(tmp_path)) == trials
    assert launch.started[2] == launch.started[3]  # the unfinished trial continues in its folder
    for row in rows(tmp_path):
        assert 1e-6 <= float(row["learning_rate"]) <= 1e-4
        assert float(row["num_train_epochs"]) in (3, 4, 5)


def test_equal_draws_run_once(tmp_path: Path) -> None:
    launch = Quick(lambda given: {"forget_quality": float(given["beta"])})
    assert sweep(tmp_path, launch, "--space", "beta=choice:.1,.2", "--sampler", "random", "--trials", "8") == 0
    assert len(launch.finished) == len(set(launch.finished)) <= 2
    assert len(rows(tmp_path)) == 8


def test_workers_get_a_gpu_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    launch = Quick(good)
    sweep(tmp_path, launch, "--grid", "learning_rate=1e-5", "beta=.1,.2,.3,.4", "--use_cpu", "False")
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in launch.environments] == ["2", "5", "2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launch = Quick(good)
    sweep(tmp_path / "cpu", launch, "--grid", "learning_rate=1e-5", "beta=.1", "--use_cpu", "False")
    assert launch.environments == [{}]


def test_machines_share_a_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two folders on one database. A worker that stops sending heartbeats is treated as dead."""
    storage = ("--storage", f"sqlite:///{tmp_path / 'shared.db'}", "--study", "both")
    grid = ("--grid", "learning_rate=1e-5", "beta=.1,.2,.3", *storage)
    lost = Quick(good, killed_at=(2,))
    with pytest.raises(Killed):
        sweep(tmp_path / "a", lost, *grid)
    found = Quick(good)
    monkeypatch.setattr("efface.sweep.ledger.GRACE", 0.5)
    assert sweep(tmp_path / "b", found, *grid) == 0
    assert lost.finished + sorted(found.finished) == [f"learning_rate=1e-05,beta={b}" for b in (0.1, 0.2, 0.3)]
    assert len(rows(tmp_path / "b")) == 3


def test_points_planned_by_two_machines_run_once(tmp_path: Path) -> None:
    """Both see an empty study, and both enqueue every point."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    space = parse_grid(["beta=.1,.2"])
    books = [Ledger(tmp_path / name, url, "s", space=space, sampler="grid", count=0, settings={}) for name in "ab"]
    for book in books:
        counted = book._counted
        book._counted = list  # type: ignore[method-assign]
        book.plan()
        book._counted = counted  # type: ignore[method-assign]
    assert len(books[0]._study.trials) == 4
    claims = [book.claim() for book in (*books, *books, *books)]
    assert sorted(claim.name for claim in claims if claim is not None) == ["beta=0.1", "beta=0.2"]


def test_a_failure_that_another_machine_remembers_is_tried_again_there(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    space = parse_grid(["beta=.1"])
    here, there = (
        Ledger(tmp_path / name, url, "s", space=space, sampler="grid", count=0, settings={}) for name in "ab"
    )
    here.plan()
    claim = there.claim()
    assert claim is not None
    claim.place.finish(Result(error="out of memory", exit_code=1))
    there.tell(claim, Result(error="out of memory", exit_code=1), Floor())
    assert claim.lock is not None
    os.close(claim.lock)
    assert here.retry_failed() == 1
    again = there.claim()
    assert again is not None
    assert again.name == claim.name
    assert again.place.result() is None


def test_the_retain_model_is_evaluated_by_one_trial(tmp_path: Path) -> None:
    launch = Quick(good)

    def with_retain_log(words: Sequence[str], log: Path, environment: Mapping[str, str], lock: int) -> Ended:
        folder = Path(words[[word.startswith("--output-dir=") for word in words].index(True)].partition("=")[2])
        if not any(word.startswith("--retain-log=") for word in words):
            (folder / "evaluation" / "retain_model").mkdir(parents=True)
            (folder / "evaluation" / "retain_model" / "TOFU_EVAL.json").write_text("{}")
        return launch(words, log, environment, lock)

    sweep(tmp_path, with_retain_log, "--grid", "learning_rate=1e-5", "beta=.1,.2,.3")
    given = [any(word.startswith("--retain-log=") for word in words) for words in launch.words]
    assert given == [False, True, True]


def test_a_dry_run_lists_the_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["sweep", "--recipe", "npo-tofu-forget10-llama-3.2-3b", "--output_dir", str(out), "--dry-run"]
    assert main([*words, "--preset", "audit-54"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("learning_rate=") == 54
    assert "54 trials, 5,265 steps" in shown  # 27 x 13 steps x (5 + 10) epochs
    assert main([*words, "--space", "beta=float:0.1:1", "--trials", "3"]) == 0
    assert "3 trials, 195 steps" in capsys.readouterr().out
    assert main([*words, "--grid", "beta=.1,.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["trials"]
    assert [(trial["parameters"], trial["steps"]) for trial in found] == [({"beta": 0.1}, 65), ({"beta": 0.5}, 65)]
    assert not out.exists()


def test_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["sweep", "--recipe", "tofu-npo", "--grid", "beta=.1", "--output_dir", str(tmp_path / "out")]) == 2
    assert "pip install 'efface[sweep]'" in capsys.readouterr().err


def test_the_space_of_draws() -> None:
    kinds = {each.name: each.described() for each in parse_space(["learning-rate=log:1e-6:1e-4", "alpha=choice:1,2"])}
    assert kinds == {"learning_rate": "log:1e-06:0.0001", "alpha": [1.0, 2.0]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved_llama(tmp_path / "llama")
    for name, texts in (("forget", TEXTS[:2]), ("retain", TEXTS[2:])):
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, texts)))
    return tmp_path


def flags(folder: Path) -> list[str]:
    """Return flags without a recipe: unlearning of a tiny model with a checkpoint every step."""
    words = ["--model", folder / "llama", "--forget", folder / "forget.json", "--retain", folder / "retain.json"]
    words += ["--objective", "npo", "--num_train_epochs", 2, "--pairs_per_step", 1, "--save_schedule", 1]
    return [*map(str, words), "--use_cpu", "True", "--output_dir", str(folder / "out")]


def test_trials_in_work_go_on_from_their_checkpoints(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real runs of a tiny model, killed during a step. The reference is computed once."""
    from efface.hf.train.trainer import UnlearnTrainer

    monkeypatch.setenv("EFFACE_CACHE", str(folder / "cache"))
    steps: list[str] = []
    step = UnlearnTrainer.training_step

    def counted(trainer: UnlearnTrainer, *args: Any, **options: Any) -> Any:
        if len(steps) in (2, 8):
            steps.append("killed")
            raise Killed
        steps.append(str(trainer.args.output_dir))
        return step(trainer, *args, **options)

    monkeypatch.setattr(UnlearnTrainer, "training_step", counted)
    said: list[str] = []

    def launch(words: Sequence[str], log: Path, environment: Mapping[str, str], lock: int) -> Ended:
        return Ended(run_trial(words, None))

    def fill(words: Sequence[str], log: Path) -> int:
        said.append(str(log))
        return main(["cache-reference", *words])

    grid = ["--grid", "beta=.1,.2,.5"]
    for _ in range(2):
        with pytest.raises(Killed):
            sweep_command.carry_out(parse_sweep([*flags(folder), *grid]), launch, fill, Console(quiet=True))
    assert sweep_command.carry_out(parse_sweep([*flags(folder), *grid]), launch, fill, Console(quiet=True)) == 0
    assert steps.count("killed") == 2
    assert len(steps) - 2 == 3 * 4  # two epochs of two rows each, and no step twice
    assert len(said) == 1
    assert len(rows(folder / "out")) == 3
    assert {row["state"] for row in rows(folder / "out")} == {"complete"}


def test_a_trial_of_plain_flags_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the trial was killed between training and evaluation. A failed trial is not evaluated."""
    called: list[list[str]] = []
    monkeypatch.setattr("efface.cli.sweep.main", lambda words: called.append(words) or int("bad" in words))
    words, out = [f"--output-dir={tmp_path}"], tmp_path / "evaluation"
    evaluation = ["evaluate", f"--model={tmp_path}", f"--output={out}", "--split", "forget05"]
    assert run_trial(words, evaluation[3:]) == 0
    assert called == [["unlearn", *words], evaluation]
    assert run_trial(["bad", *words], evaluation[3:]) == 1
    assert called[2:] == [["unlearn", "bad", *words]]
    (tmp_path / "run.json").write_text(json.dumps({"finished": True}))
    assert run_trial(words, evaluation[3:]) == 0
    assert called[3:] == [evaluation]


@pytest.mark.slow
def test_the_real_command_killed_and_given_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With subprocesses: SIGKILL of the sweep stops its trial, and the same command resumes it."""
    environment = {**os.environ, "EFFACE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "efface", "sweep", *flags(folder), "--grid", "beta=.1,.5"]
    with subprocess.Popen(
        words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "beta=0.1: started" in line:
                process.kill()
    done = subprocess.run(words, capture_output=True, env=environment, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [row["state"] for row in rows(folder / "out")] == ["complete"] * 2
    assert "reference" not in done.stderr
