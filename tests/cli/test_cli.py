"""Tests of the command line: outputs, rejected input, exit codes, shell completion and the width of tables."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import efface
from efface.cli import tiny as tiny_command
from efface.cli.main import COMMANDS, COMMON, EXIT_CODES, main
from efface.cli.progress import PIPE_WIDTH, open_console
from efface.files import written_whole
from efface.hf.train.arguments import UnlearnArguments
from support.helpers import TEXTS, written_rows


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "forget.json", tmp_path / "retain.json"
    for path, rows in zip(paths, (TEXTS[:2], TEXTS[2:]), strict=True):
        written_rows(path, rows)
    return paths


def flags(checkpoint: Path, data: tuple[Path, Path], out: Path) -> list[str]:
    return [
        "unlearn",
        *("--model", str(checkpoint), "--forget", str(data[0]), "--retain", str(data[1])),
        *("--output_dir", str(out), "--use_cpu", "True", "--max_steps", "3", "--save_strategy", "no"),
    ]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"efface {efface.__version__}\n"
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in (*COMMANDS, *COMMON, *EXIT_CODES))
    assert main([]) == 2
    assert main(["forget"]) == 2
    assert f"unknown command 'forget'; expected one of {', '.join(COMMANDS)}" in capsys.readouterr().err


def test_help_is_instant() -> None:
    """A subprocess uses less than half a second of CPU time; importing torch takes several."""
    process = subprocess.Popen([sys.executable, "-m", "efface", "--help"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_utime + usage.ru_stime < 0.5


def test_plan_prints_what_an_epoch_holds(
    checkpoint: Path, data: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--tokenizer", str(checkpoint), "--forget", str(data[1]), "--retain", str(data[0])]
    words += ["--pairs-per-step", "2", "--processes", "1", "2", "--token-budget", "100"]
    assert main([*words, "--json"]) == 0
    alone, two = json.loads(capsys.readouterr().out)
    assert (alone["steps"], two["steps"], two["processes"]) == (2, 2, 2)
    assert 0 < alone["tokens"] < two["tokens"]  # every forward pass runs the prefix that its sequences share
    assert 0 <= alone["padding_saved"] < 1
    assert 0 < alone["efficiency_with_last"] <= 1
    assert main([*words, "--json", "--share-prefixes", "false"]) == 0
    apart = json.loads(capsys.readouterr().out)
    assert apart[0]["tokens"] == apart[1]["tokens"] > two["tokens"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "an epoch over 3 forget and 2 retain sequences" in shown
    assert f"{alone['tokens']:,}" in shown
    assert "…" not in shown  # nothing is truncated where the width of the terminal is unknown
    assert main([*words[:5], "--processes", "0"]) == 2
    assert "`world_size`: expected 1 .. 65536, got 0" in capsys.readouterr().err
    assert main([*words[:5], "--forget-filter", "topic_id=3"]) == 2
    assert "expected a column 'topic_id'" in capsys.readouterr().err


def test_unlearn_takes_the_rows_that_its_filters_choose(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "fame.csv"
    lines = [f"{i},{i % 3},What is {i}?,It is {i}." for i in range(12)]
    path.write_text("\n".join(["identity_id,topic_id,prompt,reply", *lines]))
    words = flags(checkpoint, (path, path), tmp_path / "out")
    words += ["--question_column", "prompt", "--answer_column", "reply", "--retain_filter", "topic_id!=2"]
    assert main([*words, "--forget_filter", "topic_id=2", "identity_id!=5,8", "--pairs_per_step", "1"]) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["epoch"] == 1.5  # 3 steps over the rows 2 and 11
    assert main([*words, "--overwrite", "--forget_filter", "topic_id=7"]) == 2
    assert "none of 12 rows has '7' in column 'topic_id', which has " in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["npo", "simnpo", "graddiff", "grad_ascent"])
def test_unlearn_writes_a_model_that_loads(
    objective: str, checkpoint: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main([*flags(checkpoint, data, out), "--objective", objective, "--logging_steps", "1"]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    before = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert tokenizer.eos_token == "<|end|>"
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert {"forget_loss", "tokens_per_second"} <= state["log_history"][0].keys()
    assert not list(out.glob(".partial-*"))


def test_a_config_file_sets_flags_and_the_command_line_wins(
    checkpoint: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {checkpoint}\nforget: {data[0]}\nretain: {data[1]}\noutput_dir: {tmp_path / 'out'}\n"
        "objective: npo\nbeta: 0.2\nalpha: null\nuse_cpu: true\nmax_steps: 5\nsave_strategy: 'no'\n"
    )
    assert main(["unlearn", "--config", str(config), "--max_steps", "2"]) == 0
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 2


def test_an_output_folder_that_is_not_empty(
    checkpoint: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert main(flags(checkpoint, data, out)) == 2
    assert "is not empty; choose another, or add --overwrite" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert main([*flags(checkpoint, data, out), "--overwrite"]) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert main([*flags(checkpoint, data, out / "notes.txt")]) == 2
    assert "expected a folder, got a file; choose another path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--objective", "forgetful"], "objective: expected one of ceu, dpo, grad_ascent"),
        (
            ["--objective", "graddiff", "--beta", "1"],
            "expected parameters from (alpha, gamma, retain_loss_type), got beta",
        ),
        (["--forget", "missing.json"], "data file 'missing.json' does not exist"),
        (["--model", "./missing"], "model folder './missing' does not exist"),
        (["--config", "missing.yaml"], "config file 'missing.yaml' does not exist"),
        (["--config"], "expected the path of a YAML file"),
        (["--lerning_rate", "1"], "unknown arguments --lerning_rate 1"),
        (["--answer_column", "reply"], "expected a column 'reply'"),
        (["--template", "alpaca"], "`template`: expected one of"),
        (["--reference", "none"], "`reference`: expected one of"),
    ],
)
def test_wrong_use_is_explained(
    change: list[str],
    message: str,
    checkpoint: Path,
    data: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*flags(checkpoint, data, tmp_path / "out"), *change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_diverging_run_has_its_own_exit_code_and_leaves_no_model(
    checkpoint: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    changes = ["--learning_rate", "1e30", "--objective", "grad_ascent", "--max_grad_norm", "0", "--max_steps", "20"]
    assert main([*flags(checkpoint, data, out), *changes]) == 3
    assert "the loss is not finite at step" in capsys.readouterr().err
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("adapter", [[], ["--lora_r", "2"], ["--lora_r", "2", "--merge_adapter"]])
def test_weights_that_the_last_step_broke_are_not_saved(
    adapter: list[str], checkpoint: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    changes = ["--learning_rate", "1e300", "--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    assert main([*flags(checkpoint, data, out), *changes, *adapter]) == 3
    assert "the weights are not finite after step 1" in capsys.readouterr().err
    assert not [*out.rglob("*.safetensors")]


def test_a_config_that_is_not_yaml_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("forget: [unclosed\n")
    assert main(["unlearn", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "expected YAML, got something else" in capsys.readouterr().err
    for content, message in (
        ("learning_rate: 1e-3\nlearning_rate: 5e-3\n", "found 'learning_rate' twice"),
        ("learning-rate: 1e-3\nlearning_rate: 5e-3\n", "expected each flag once, got 'learning_rate'"),
    ):
        (tmp_path / "run.yaml").write_text(content)
        assert main(["unlearn", "--config", str(tmp_path / "run.yaml")]) == 2
        assert message in capsys.readouterr().err


def test_noise_that_depends_on_the_pack_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`neftune_noise_alpha`: expected None, got 5"):
        UnlearnArguments(output_dir=str(tmp_path), use_cpu=True, neftune_noise_alpha=5)


def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("old")

    def fail() -> None:
        with written_whole(tmp_path) as partial:
            (partial / "model.txt").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["model.txt"]
    assert (tmp_path / "model.txt").read_text() == "old"
    with written_whole(tmp_path) as partial:
        (partial / "model.txt").write_text("new")
    assert (tmp_path / "model.txt").read_text() == "new"


def test_weights_of_another_model_are_removed(checkpoint: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    """Loading would apply an old adapter to the new model, or prefer an old file to the new shards."""
    out = tmp_path / "out"
    out.mkdir()
    stale = ["adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors"]
    for name in (*stale, "model.safetensors.index.json", "notes.txt"):
        (out / name).write_text("{}")
    (out / "best").mkdir()
    assert main([*flags(checkpoint, data, out), "--overwrite"]) == 0
    assert not any((out / name).exists() for name in (*stale, "model.safetensors.index.json", "best"))
    assert (out / "notes.txt").is_file()
    assert (out / "model.safetensors").is_file()


def test_a_finished_training_is_not_trained_further(
    checkpoint: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rows, one per step, for 1.5 epochs: 3 steps. The run broke off after the last step, before the final save."""
    out = tmp_path / "out"
    words = [*flags(checkpoint, data, out)[:-4], "--num_train_epochs", "1.5", "--pairs_per_step", "1"]
    words += ["--save_schedule", "1", "--lr_scheduler_type", "constant", "--learning_rate", "1e-3"]
    assert main(words) == 0
    whole, record = (out / "model.safetensors").read_bytes(), json.loads((out / "run.json").read_text())
    (out / "model.safetensors").unlink()
    (out / "run.json").write_text(json.dumps({**record, "finished": False}))
    assert main(words) == 0
    assert "continuing from" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == whole
    assert not (out / "checkpoint-4").exists()


def completed(script: Path, line: str) -> list[str]:
    """Return bash's completions for a line."""
    code = f"""
        source {script}
        COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}
        COMP_WORDS=({line}); [[ $COMP_LINE == *' ' ]] && COMP_WORDS+=('')
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _shtab_efface
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_every_command_has_a_parser() -> None:
    for name, (module, _) in COMMANDS.items():
        assert importlib.import_module(module).parser().prog == f"efface {name}"


def test_bash_completes_commands_flags_and_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "efface"
    script.write_text(capsys.readouterr().out)
    assert completed(script, "efface ev") == ["evaluate"]
    assert "--learning-rate" in completed(script, "efface unlearn --learning")
    assert completed(script, "efface evaluate --protocol ") == ["open-unlearning", "tofu"]
    assert "simnpo-tofu-forget05-llama-2-7b" in completed(script, "efface unlearn --recipe simnpo")


def test_zsh_gets_a_script_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    assert "#compdef efface" in capsys.readouterr().out


def test_bench_runs_the_benchmarks_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def run(command: list[str], env: dict[str, str], check: bool) -> subprocess.CompletedProcess[bytes]:
        seen.update(command=command, path=env["PYTHONPATH"].split(":")[0])
        return subprocess.CompletedProcess(command, 5)

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["bench", "loss", "--shape", "smoke"]) == 5
    assert seen["command"] == [sys.executable, "-m", "benchmarks", "loss", "--shape", "smoke"]
    assert (Path(seen["path"]) / "benchmarks" / "__main__.py").is_file()


def test_bench_without_a_checkout_says_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(efface, "__file__", str(tmp_path / "site" / "efface" / "__init__.py"))
    assert main(["bench", "loss"]) == 2
    assert "git clone the repository" in capsys.readouterr().err


@pytest.mark.parametrize(("columns", "width"), [("72", PIPE_WIDTH), ("300", 300)])
def test_a_pipe_is_wide(columns: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert open_console().width == width
    assert open_console(stderr=True).stderr


def test_figures_of_a_recipe_are_whole_on_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    figures = dict(
        zip(tiny_command._COLUMNS.values(), [1.46e-13, 0.9291, 5.22e-05, 0.0411, 0.558, 0.0353, 0.285], strict=True)
    )
    model = SimpleNamespace(name="unlearned", note="", figures=figures)
    run = SimpleNamespace(recipe="r", data="d", changed={}, overrides=[], revisions=[], models=[model])
    tiny_command.show(run, Console(width=80))  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    for value in figures.values():
        assert f"{value:.3g}" in shown
    assert "…" not in shown
