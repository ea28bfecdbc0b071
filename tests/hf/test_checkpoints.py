"""Tests of checkpoints: complete or absent, and a killed run that resumes with the same bits."""

import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

import efface
from efface import NPO, UnlearnTrainer
from efface.batching import Role, TokenStore
from efface.cli.main import main
from efface.cli.run_folder import RunFolder
from efface.files import bytes_in_words, remove_leftovers
from efface.hf.text.data import store_fingerprint
from efface.hf.train.arguments import UnlearnArguments
from efface.hf.train.checkpoints import CheckpointError, checkpoints, newest_checkpoint, rotate
from efface.hf.train.publish import HubError, final_metrics
from efface.hf.train.record import command_line
from support.helpers import TEXTS, arguments, random_store, saved_llama, tiny_llama, tiny_tokenizer, written_rows
from support.processes import RANKS, environment, launch


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """``efface unlearn`` with dropout, warm-up and a decaying rate. Logs and checkpoints happen at different steps."""
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), attention_dropout=0.2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = written_rows(tmp_path / "rows.json")
    words = ["unlearn", "--model", str(tmp_path / "model"), "--forget", str(data), "--retain", str(data)]
    words += ["--use_cpu", "True", "--pairs_per_step", "2", "--num_train_epochs", "4", "--learning_rate", "1e-3"]
    words += ["--warmup_steps", "3", "--lr_scheduler_type", "linear", "--token_budget", "64", "--logging_steps", "3"]
    return [*words, "--save-schedule", "2", "--save_total_limit", "2"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return tensors


def same_bits(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


CURVE = ("step", "epoch", "loss", "forget_loss", "retain_loss", "grad_norm", "learning_rate")


def curve(folder: Path) -> list[list[Any]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [[entry[key] for key in CURVE] for entry in history if "loss" in entry]


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_with_the_same_bits(command: list[str], tmp_path: Path) -> None:
    done = launch(0, [str(RANKS / "killed_run.py"), str(tmp_path), json.dumps(command)], limit=900)
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert "failed" not in record, record["failed"][-4000:]
    assert len(record["where"]) == 10
    assert record["where"].count("step") >= 3, record["where"]
    assert any(".partial-checkpoint" in moment for moment in record["where"]), record["where"]
    same_bits(tmp_path / "undisturbed", tmp_path / "killed")
    assert curve(tmp_path / "killed") == curve(tmp_path / "undisturbed")
    assert len(curve(tmp_path / "killed")) == 4
    names = {path.name for path in (tmp_path / "killed").iterdir()}
    assert names == {path.name for path in (tmp_path / "undisturbed").iterdir()}
    assert {"checkpoint-10", "checkpoint-12"} <= names
    assert "checkpoint-8" not in names


def python_run(folder: Path, resume: bool | str | None = None, **changes: Any) -> UnlearnTrainer:
    settings = {"num_train_epochs": 3, "logging_steps": 3, "save_strategy": "steps", "save_steps": 2, **changes}
    callbacks = settings.pop("callbacks", [])
    options = {key: settings.pop(key) for key in ("hub_client",) if key in settings}
    trainer = UnlearnTrainer(
        tiny_llama(attention_dropout=0.2),
        arguments(folder, **settings),
        forget=random_store(10, seed=1),
        retain=random_store(12, seed=2),
        objective=NPO(),
        callbacks=callbacks,
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def parameters(trainer: UnlearnTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_python_resumes_from_any_checkpoint(step: int, tmp_path: Path) -> None:
    whole = python_run(tmp_path)
    for later in range(step + 1, 10):
        shutil.rmtree(tmp_path / f"checkpoint-{later}", ignore_errors=True)
    again = python_run(tmp_path, resume=True)
    assert whole.state.global_step == again.state.global_step == 9
    for name, tensor in parameters(whole).items():
        assert torch.equal(tensor, parameters(again)[name]), name
    for mine, theirs in zip(whole.state.log_history[:-1], again.state.log_history[:-1], strict=True):
        assert {key: mine[key] for key in CURVE} == {key: theirs[key] for key in CURVE}
    assert whole.meter.tokens == again.meter.tokens
    # of the model before training, not after
    assert torch.equal(whole._reference._sums[Role.FORGET], again._reference._sums[Role.FORGET])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        # With another number of processes the missing files would have other names, and transformers alone writes no
        # progress.
        *((name, damage) for name in ("optimizer.pt", "scheduler.pt") for damage in ("missing", "empty", "cut off")),
        *((name, damage) for name in ("rng_state.pth", "progress.pt") for damage in ("empty", "cut off")),
    ],
)
def test_a_checkpoint_without_its_parts_is_not_resumed(name: str, damage: str, tmp_path: Path) -> None:
    python_run(tmp_path, max_steps=2)
    file = tmp_path / "checkpoint-2" / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 0 if damage == "empty" else -40])
    with pytest.raises(CheckpointError, match=name):
        python_run(tmp_path, resume=True)


def test_a_run_that_had_ended_trains_no_step_more(tmp_path: Path) -> None:
    """Also if max_steps is in the middle of an epoch."""
    first = python_run(tmp_path, max_steps=4)
    again = python_run(tmp_path, resume=True, max_steps=4)
    assert again.state.global_step == 4
    for name, tensor in parameters(first).items():
        assert torch.equal(tensor, parameters(again)[name]), name


def test_a_finished_model_is_not_a_checkpoint_to_resume_from(tmp_path: Path) -> None:
    """Its folder contains the state of an arbitrary run, so resuming from it would return it as already trained."""
    first = python_run(tmp_path / "first", max_steps=2)
    first.save_model()
    first.save_state()
    with pytest.raises(CheckpointError, match=r"first': expected optimizer\.pt, which an exact continuation needs"):
        python_run(tmp_path / "second", resume=str(tmp_path / "first"), max_steps=2)


def test_a_checkpoint_of_weights_only_can_end_a_run_but_not_resume_it(tmp_path: Path) -> None:
    whole = python_run(tmp_path, max_steps=2, save_only_model=True)
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    again = python_run(tmp_path, resume=str(tmp_path / "checkpoint-2"), max_steps=2, save_only_model=True)
    assert all(torch.equal(tensor, parameters(again)[name]) for name, tensor in parameters(whole).items())
    with pytest.raises(CheckpointError, match=r"expected optimizer.pt"):
        python_run(tmp_path, resume=str(tmp_path / "checkpoint-2"), max_steps=4, save_only_model=True)


def test_a_callback_may_be_added_to_a_run_that_is_resumed(tmp_path: Path) -> None:
    class Seen(TrainerCallback, ExportableState):
        steps = 0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.steps += 1

        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"steps": self.steps}}

    python_run(tmp_path, max_steps=2)
    python_run(tmp_path, resume=True, max_steps=4, callbacks=[Seen()])
    stored = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert stored["Seen"]["attributes"] == {"steps": 2}


def test_resuming_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`resume_from_checkpoint`: expected checkpoint-N"):
        python_run(tmp_path, resume=True)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save

    def full(value: Any, path: Any, *rest: Any, **options: Any) -> None:
        if "checkpoint-4" in str(path) and "optimizer" in str(path):
            raise OSError(28, "No space left on device")
        save(value, path, *rest, **options)

    message = r"checkpoint-4 could not be written.*No space left.*checkpoint-2 is complete"
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(CheckpointError, match=message):
            python_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "efface-cache") == ["checkpoint-2"]
    assert python_run(tmp_path, resume=True).state.global_step == 9


def test_a_checkpoint_replaces_one_of_its_name(tmp_path: Path) -> None:
    stale = tmp_path / "checkpoint-2"
    stale.mkdir()
    (stale / "half.txt").write_text("of another time")
    python_run(tmp_path, max_steps=2)
    assert not (stale / "half.txt").exists()
    assert (stale / "README.md").is_file()
    assert not list(tmp_path.glob(".partial-*"))


def test_an_interrupted_checkpoint_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        python_run(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name != "efface-cache"]


def test_rotation_spares_the_newest_and_what_is_in_use(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    rotate(tmp_path, None, set())
    assert list(checkpoints(tmp_path)) == [2, 4, 10]
    rotate(tmp_path, 1, {tmp_path / "checkpoint-2"})
    assert list(checkpoints(tmp_path)) == [2, 10]
    rotate(tmp_path, 1, set())
    assert list(checkpoints(tmp_path)) == [10]
    assert (tmp_path / "checkpoint-best").is_dir()
    assert newest_checkpoint(tmp_path) is None  # an empty folder is not a checkpoint
    assert not list(tmp_path.glob(".partial-*"))


def test_only_our_own_leftovers_are_removed(tmp_path: Path) -> None:
    for name in (".partial-checkpoint-4", ".partial-old-checkpoint-2", ".git", "checkpoint-2"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".git", "checkpoint-2"]


def test_the_state_of_callbacks_continues(tmp_path: Path) -> None:
    class Counter(EarlyStoppingCallback):
        def __init__(self) -> None:
            super().__init__(3)
            self.seen = 0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            pass

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seen += 1
            self.early_stopping_patience_counter += 1

        def state_dict(self) -> dict[str, int]:
            return {"seen": self.seen}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.seen = state["seen"]

    python_run(tmp_path, callbacks=[Counter()], max_steps=5)
    counter = Counter()
    python_run(tmp_path, resume=True, callbacks=[counter], max_steps=7)
    assert counter.seen == counter.early_stopping_patience_counter == 7


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"save_schedule": "epoch"}, ("epoch", 500)),
        ({"save_schedule": "7"}, ("steps", 7)),
        ({"save_schedule": "no"}, ("no", 500)),
        ({"save_schedule": "epoch", "save_strategy": "epoch"}, ("epoch", 500)),
        ({"save_strategy": "steps", "save_steps": 3}, ("steps", 3)),
        ({}, ("steps", 500)),
        ({"save_schedule": "epoch", "save_strategy": "steps"}, "contradicts save_strategy='steps'"),
        ({"save_schedule": "7", "save_steps": 8}, "contradicts save_strategy='steps', save_steps=8"),
        ({"save_schedule": "0"}, "expected epoch, no, or a number"),
        ({"save_schedule": "weekly"}, "expected epoch, no, or a number"),
        ({"revision_per_checkpoint": True}, "expected --push-to-hub too"),
    ],
)
def test_save_schedule(settings: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    def made() -> UnlearnArguments:
        return UnlearnArguments(output_dir=str(tmp_path), use_cpu=True, **settings)

    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            made()
        return
    args = made()
    assert (getattr(args.save_strategy, "value", args.save_strategy), args.save_steps) == expected


# The command line


@pytest.mark.parametrize(
    ("wrong", "code"),
    [(["--max_steps", "1", "--warmup_steps", "5"], 2), (["--learning_rate", "1e38", "--warmup_steps", "0"], 3)],
)
def test_a_run_that_is_wrong_from_the_start_leaves_the_folder_as_it_was(
    wrong: list[str], code: int, command: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [*command, "--output", str(out), "--max_steps", "2", "--save_schedule", "no"]
    assert main([*words, *wrong]) == code
    assert not out.exists()
    assert main(words) == 0
    record = (out / "run.json").read_text()
    assert main([*words, "--overwrite", *wrong]) == code
    assert (out / "run.json").read_text() == record


def test_the_same_command_continues_and_another_is_refused(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = UnlearnTrainer.training_step

    def interrupted(trainer: UnlearnTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(UnlearnTrainer, "training_step", interrupted)
    out = tmp_path / "out"
    words = [*command, "--output_dir", str(out), "--hub_token", "hf_secret"]
    assert main(words) == 130
    told = capsys.readouterr().err
    assert "run the same command again to continue: it will resume from checkpoint-4" in told
    monkeypatch.undo()
    monkeypatch.setenv("EFFACE_CACHE", str(tmp_path / "efface-cache"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")

    assert main([*words, "--beta", "0.2", "--learning_rate", "1e-4", "--seed", "3"]) == 2
    told = capsys.readouterr().err
    assert "contains an unfinished run of another command" in told
    for change in ("objective.beta: was 0.1, is 0.2", "learning_rate: was 0.001, is 0.0001", "seed: was 42, is 3"):
        assert change in told
    rows = tmp_path / "rows.json"
    content = rows.read_text()
    rows.write_text(content.replace("Ghent", "Gent"))
    assert main(words) == 2
    assert "data.forget: was" in capsys.readouterr().err
    rows.write_text(content)

    assert main([*words, "--overwrite", "--logging_steps", "3", "--run_name", "again"]) == 0
    assert f"continuing from {out / 'checkpoint-4'}" in capsys.readouterr().err
    assert "hf_secret" not in (out / "README.md").read_text() + (out / "run.json").read_text()
    assert main(words) == 2
    assert "it contains a finished run" in capsys.readouterr().err
    fresh = tmp_path / "fresh"
    assert main([*command, "--output_dir", str(fresh)]) == 0
    same_bits(out, fresh)
    assert curve(out) == curve(fresh)


def test_overwriting_removes_the_checkpoints_of_another_run(tmp_path: Path) -> None:
    RunFolder(tmp_path / "out", overwrite=False).begin({"objective": "npo"})
    (tmp_path / "out" / "checkpoint-100").mkdir()
    assert RunFolder(tmp_path / "out", overwrite=True).begin({"objective": "simnpo"}) is None
    assert checkpoints(tmp_path / "out") == {}


def free_space(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=count))


def test_a_run_that_does_not_fit_the_disk_does_not_begin(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Required: the weights and twice as much for AdamW, for two kept checkpoints and a third one, plus the model."""
    out = tmp_path / "out"
    words = [*command, "--output_dir", str(out)]
    model = sum(weight.numel() * 4 for weight in tiny_llama(vocab_size=len(tiny_tokenizer())).parameters())
    whole = model + 3 * 3 * model
    free_space(monkeypatch, whole - 1)
    assert main(words) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"expected {bytes_in_words(whole)} of free space" in told
    assert f"3 checkpoints of {bytes_in_words(3 * model)} each and a model of {bytes_in_words(model)}" in told
    assert "--save-total-limit 1" in told
    assert not checkpoints(out)
    for more, count in (
        (["--save_total_limit", "1"], 2 * 3 * model),
        (["--save_total_limit", "0"], 6 * 3 * model),
        (["--save_only_model", "True"], 3 * model),
        (["--save_schedule", "no"], 0),
    ):
        free_space(monkeypatch, model + count - 1)
        assert main([*words, *more]) == 2, more
        assert "of free space" in capsys.readouterr().err
    free_space(monkeypatch, whole)
    assert main(words) == 0
    # the written size is the required one, except for small files
    newest = sum((out / "checkpoint-12" / name).stat().st_size for name in ("model.safetensors", "optimizer.pt"))
    assert 3 * model <= newest < 3 * model + 40_000


@pytest.mark.parametrize("saved", [True, False])
def test_a_full_disk_at_the_last_save_leaves_no_partial_model(
    saved: bool, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [*command, "--output_dir", str(out), *([] if saved else ["--save_schedule", "no"])]
    save = UnlearnTrainer.save_model

    def full(trainer: UnlearnTrainer, output_dir: str | None = None, **options: Any) -> None:
        if "checkpoint-" in str(output_dir):
            return save(trainer, output_dir, **options)
        Path(str(output_dir), "model.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing:\nI/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(UnlearnTrainer, "save_model", full)
        assert main(words) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "the model could not be written to" in told
    assert "No space left on device" in told
    assert (
        "it resumes from checkpoint-12, which is complete" if saved else "without a checkpoint it starts over"
    ) in told
    assert not (out / "model.safetensors").exists()
    assert not list(out.glob(".partial-*"))
    assert main(words) == 0
    assert ("continuing from" in capsys.readouterr().err) is saved
    assert (out / "model.safetensors").is_file()


def test_tokens_of_access_are_not_written(tmp_path: Path) -> None:
    args = arguments(tmp_path, hub_token="hf_secret")
    assert copy.copy(args).hub_token == args.hub_token == "hf_secret"
    assert b"hf_secret" not in pickle.dumps(args)
    read = pickle.loads(pickle.dumps(args))
    assert (read.hub_token, read.learning_rate) == (None, args.learning_rate)


def test_a_run_killed_before_it_wrote_its_record_starts_again(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".partial-run.json").write_text('{"fini')
    assert RunFolder(tmp_path / "out", overwrite=False).begin({"objective": "npo"}) is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]


def test_two_processes_do_not_share_an_output_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out", overwrite=False)
    again = RunFolder(tmp_path / "out", overwrite=True)
    with folder.locked(), pytest.raises(FileExistsError, match="another process is writing there"), again.locked():
        pass
    with folder.locked():
        pass


@pytest.mark.slow
def test_the_real_command_survives_a_real_kill(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command[command.index("--num_train_epochs") + 1] = "12"  # enough time to notice a checkpoint
    words = [sys.executable, "-m", "efface", *command, "--output_dir", str(out)]
    child = subprocess.Popen(words, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    while not list(out.glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "continuing from" in done.stderr
    whole = launch(0, [str(RANKS / "command_rank.py"), *command, "--output_dir", str(tmp_path / "whole")])
    assert whole.returncode == 0, whole.stderr[-4000:]
    same_bits(out, tmp_path / "whole")


class FakeHub:
    """A Hub on the disk with a folder per branch. The next ``failures`` uploads break off half-way."""

    def __init__(self, folder: Path, failures: int = 0) -> None:
        self.folder, self.failures = folder, failures
        self.log: list[str] = []

    def whoami(self) -> dict[str, str]:
        return {"name": "me"}

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        (self.folder / "main").mkdir(parents=True, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        (self.folder / branch).mkdir(exist_ok=exist_ok)

    def upload_folder(
        self, *, repo_id: str, folder_path: Any, revision: str, commit_message: str, ignore_patterns: list[str]
    ) -> None:
        assert repo_id == "me/forgetful"
        assert (self.folder / revision).is_dir(), "no such branch"
        self.log.append(revision)
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the line is dead")
        files = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        for name in filter_repo_objects(files, ignore_patterns=ignore_patterns):
            (self.folder / revision / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, self.folder / revision / name)


PUSHING: dict[str, Any] = {
    "push_to_hub": True,
    "revision_per_checkpoint": True,
    "hub_model_id": "forgetful",
    "save_strategy": "epoch",
}


def test_each_checkpoint_is_pushed_to_its_own_branch(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path / "hub")
    trainer = python_run(tmp_path / "run", hub_client=hub, **PUSHING)
    assert trainer.not_pushed == {}
    assert sorted(hub.log) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    for step in (3, 6, 9):
        there = {path.name for path in (tmp_path / "hub" / f"checkpoint-{step}").iterdir()}
        assert there == {"model.safetensors", "config.json", "generation_config.json", "README.md"}
        same_bits(tmp_path / "hub" / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    assert list((tmp_path / "hub" / "main").iterdir()) == []
    trainer.push_to_hub()
    same_bits(tmp_path / "hub" / "main", tmp_path / "run" / "checkpoint-9")


def test_a_push_that_fails_is_tried_again_and_stops_nothing(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path / "hub", failures=1)
    trainer = python_run(tmp_path / "run", hub_client=hub, save_total_limit=1, **PUSHING)
    assert trainer.not_pushed == {}
    assert (tmp_path / "hub" / "checkpoint-3" / "model.safetensors").is_file()
    assert hub.log.count("checkpoint-3") == 2


def test_checkpoints_that_never_reached_the_hub_are_kept_and_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub = FakeHub(tmp_path / "hub", failures=1000)
    trainer = python_run(tmp_path / "run", hub_client=hub, save_total_limit=1, **PUSHING)
    assert trainer.not_pushed == dict.fromkeys((3, 6, 9), "ConnectionError: the line is dead")
    assert list(checkpoints(tmp_path / "run")) == [3, 6, 9]
    hub.failures = 0
    again = python_run(tmp_path / "run", resume=True, hub_client=hub, save_total_limit=1, **PUSHING)
    assert again.not_pushed == {}
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {"main", *(f"checkpoint-{n}" for n in (3, 6, 9))}
    third = FakeHub(tmp_path / "hub")
    python_run(tmp_path / "run", resume=True, hub_client=third, save_total_limit=1, **PUSHING)
    assert third.log == []  # existing revisions are not pushed again


def test_the_command_pushes_revisions_and_fails_if_one_is_missing(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [*command, "--output_dir", str(out), "--push-to-hub", "--revision-per-checkpoint"]
    words += ["--hub_model_id", "forgetful", "--num_train_epochs", "1"]
    assert main(words) == 2
    assert "`--push-to-hub`: " in capsys.readouterr().err
    assert not out.exists()
    hub = FakeHub(tmp_path / "hub", failures=1000)
    monkeypatch.setattr("efface.cli.training.default_client", lambda token: hub)
    monkeypatch.setattr("efface.hf.train.publish.default_client", lambda token: hub)
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "not pushed: checkpoint-2: ConnectionError: the line is dead; checkpoint-3" in told
    assert (out / "model.safetensors").is_file()
    hub.failures = 0
    assert main(words) == 0  # the same command again: nothing to train, everything to push
    for branch, folder in (("checkpoint-2", out / "checkpoint-2"), ("main", out)):
        same_bits(tmp_path / "hub" / branch, folder)
    assert "tokenizer.json" in {path.name for path in (tmp_path / "hub" / "checkpoint-2").iterdir()}
    on_main = {path.name for path in (tmp_path / "hub" / "main").iterdir()}
    assert not {"run.json", "pushed.json", "trainer_state.json", "checkpoint-2"} & on_main


def test_a_missing_login_is_reported_before_training(tmp_path: Path) -> None:
    class Stranger(FakeHub):
        def whoami(self) -> dict[str, str]:
            raise LocalTokenNotFoundError("no token")

    with pytest.raises(HubError, match="expected a login to the Hugging Face Hub, got none; run `hf auth login`"):
        python_run(tmp_path / "run", hub_client=Stranger(tmp_path / "hub"), **PUSHING)


# ---- the model card describes for people and programs how the model was made


def test_the_card_of_a_command(tmp_path: Path) -> None:
    saved_llama(tmp_path / "model")
    data = written_rows(tmp_path / "rows.json", ({**row, "id": i % 2} for i, row in enumerate(TEXTS)))
    words = ["unlearn", "--model", str(tmp_path / "model"), "--forget", str(data), "--retain", str(data)]
    words += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "True", "--max_steps", "2", "--logging_steps", "1"]
    words += [
        "--forget_filter",
        "id=1",
        "--retain_filter",
        "id!=1",
        "--beta",
        "0.3",
        "--save_schedule",
        "1",
        "--hub_token=hf_secret",
    ]
    assert main(words) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    facts = card.data.to_dict()["efface"]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert facts["objective"] == {"name": "npo", "retain_loss_type": "NLL", "beta": 0.3, "gamma": 1.0, "alpha": 1.0}
    assert (facts["base_model"], facts["revision"], facts["step"]) == (str(tmp_path / "model"), "main", 2)
    assert facts["data"]["forget"]["rows"] == 2
    assert facts["data"]["forget"]["filters"] == ["id=1"]
    assert [(one["taken"], one["available"]) for one in facts["data"].values()] == [(2, 5), (3, 5)]
    assert "| forget | " in card.text
    assert " | 2 of 5 rows | " in card.text
    assert facts["data"]["retain"]["source"] == str(data)
    assert facts["arguments"]["max_steps"] == 2
    assert facts["plan"]["seed"] == 42
    assert facts["metrics"]["forget_loss"] == state["log_history"][1]["forget_loss"]
    assert facts["versions"]["efface"] == efface.__version__
    assert facts["versions"]["transformers"] == transformers.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["command"].startswith("efface unlearn --model ")
    assert "machine-unlearning" in card.data.tags
    assert card.data.base_model is None  # a local folder is not a name on the Hub
    for part in ("hf_secret", str(tmp_path / "out" / "checkpoint-1")):
        assert part not in card.content
    assert "| `beta` | `0.3` |" in card.text
    assert facts["command"] in card.text
    first = ModelCard.load(tmp_path / "out" / "checkpoint-1" / "README.md").data.to_dict()["efface"]
    assert first["step"] == 1
    assert first["metrics"]["loss"] == state["log_history"][0]["loss"]


def test_the_card_of_a_python_run_claims_no_command(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config._name_or_path = "meta-llama/Llama-2-7b-chat-hf"
    forget, retain = random_store(4, seed=1), random_store(6, seed=2)
    args = arguments(tmp_path, max_steps=1, weight_decay=0.25)
    trainer = UnlearnTrainer(model, args, forget=forget, retain=retain, objective=NPO())
    trainer.train()
    trainer.state.log_history.append({"eval_forget_rouge": 0.25, "eval_bad": float("nan"), "step": 1})
    trainer.save_model(str(tmp_path / "model"))
    card = ModelCard.load(tmp_path / "model" / "README.md")
    facts = card.data.to_dict()["efface"]
    assert card.data.base_model == "meta-llama/Llama-2-7b-chat-hf"
    assert facts["command"] is None
    assert "## Reproduce" not in card.text
    assert facts["data"]["forget"] == {
        "source": "TokenStore in memory",
        "rows": 4,
        "fingerprint": store_fingerprint(forget),
        "filters": [],
        "hub_name": "",
        "taken": None,
        "available": None,
    }
    assert facts["arguments"]["weight_decay"] == 0.25
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("eval_forget_rouge", 0.25)
    assert facts["reference"] == "cached"


def test_metrics_are_the_last_finite_ones() -> None:
    log = [{"loss": 2.0, "eval_a": 1.0, "epoch": 1}, {"loss": 1.5, "retain_loss": 3}, {"eval_a": float("nan")}]
    assert final_metrics([*log, {"train_loss": 9.0}]) == ({"loss": 1.5, "retain_loss": 3.0}, {"eval_a": 1.0})


def test_a_data_fingerprint_is_of_the_content() -> None:
    rows = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    whole = TokenStore.from_sequences(rows, [1, 1, 2])
    parts = [TokenStore.from_sequences(rows[:1], [1]), TokenStore.from_sequences(rows[1:], [1, 2])]
    assert store_fingerprint(whole) == store_fingerprint(TokenStore([store.chunks[0] for store in parts]))
    ids, offsets, starts = whole.chunks[0]
    view = TokenStore([(ids, offsets[1:], starts[1:])])  # a slice whose first tokens belong to none of its sequences
    assert store_fingerprint(view) == store_fingerprint(parts[1])
    others = [
        TokenStore.from_sequences([[1, 2, 3], [4, 5], [6, 7, 8, 8]], [1, 1, 2]),
        TokenStore.from_sequences(rows, [1, 1, 1]),
        TokenStore.from_sequences(rows[::-1], [2, 1, 1]),
        TokenStore.from_sequences([[1, 2, 3, 4], [5, 6], [7, 8, 9]], [1, 1, 2]),
        TokenStore.empty(),
    ]
    assert len({store_fingerprint(store) for store in [whole, *others]}) == 6
    assert np.array_equal(whole[1], [4, 5])


@pytest.mark.parametrize("words", [["--hub_token", "hf_x"], ["--hub-token=hf_x"], ["--push_to_hub_token", "hf_x"]])
def test_a_command_line_has_no_secrets(words: list[str]) -> None:
    line = command_line([*words, "--forget_filter", "a b=1"])
    assert "hf_x" not in line
    assert line.endswith("--forget_filter 'a b=1'")
