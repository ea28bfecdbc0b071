"""``efface completion`` and ``efface bench``: what a shell completes, and where the benchmarks are."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import efface
from efface.cli.main import COMMANDS, main


def completed(script: Path, line: str) -> list[str]:
    """What bash offers for a line."""
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
    assert "--learning_rate" in completed(script, "efface unlearn --learning")
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
