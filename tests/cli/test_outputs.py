"""Tests of what commands overwrite: no inputs, no results of another model, and nothing silently."""

import csv
import io
import json
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from efface.cli.main import main
from efface.cli.run_folder import RunFolder
from efface.cli.sweep import csv_cell
from efface.cli.training import config_of, model_inputs
from efface.evaluate import logs
from efface.evaluate.logs import check_results, read_json, write_results
from efface.evaluate.report import find
from efface.files import check_output, in_words, locked_folder, private_folder, refuse_inputs, take_lock, written_file
from efface.hf.train.checkpoints import REPLACED, RESULTS, checkpoints
from support.helpers import written_rows

# Every command that writes an output, with an input that the output would replace: (words, existing file, flag).
REPLACES: dict[str, tuple[str, str, str]] = {
    "unlearn, a checkpoint in the output": (
        "unlearn --model myft/checkpoint-200 --forget rows.jsonl --objective grad_ascent --output-dir myft --overwrite",
        "myft/checkpoint-200/config.json",
        "--model",
    ),
    "unlearn, the model itself": (
        "unlearn --model myft --forget rows.jsonl --objective grad_ascent --output-dir myft/ --overwrite",
        "myft/config.json",
        "--model",
    ),
    "unlearn, by a link": (
        "unlearn --model link --forget rows.jsonl --objective grad_ascent --output-dir myft --overwrite",
        "myft/config.json",
        "--model",
    ),
    "unlearn, a revision": (
        (
            "unlearn --model myft --revision checkpoint-2 --forget rows.jsonl --objective grad_ascent --output-dir "
            "myft/checkpoint-2 --overwrite"
        ),
        "myft/checkpoint-2/config.json",
        "revision checkpoint-2",
    ),
    "unlearn, the base of an adapter": (
        "unlearn --model adapter --forget rows.jsonl --objective grad_ascent --output-dir base --overwrite",
        "base/config.json",
        "its base model",
    ),
    "unlearn, the reference": (
        "unlearn --model myft --reference-model out/full --forget rows.jsonl --output-dir out --overwrite",
        "out/full/config.json",
        "--reference-model",
    ),
    "unlearn, the forget set": (
        "unlearn --model myft --forget out/f.jsonl --objective grad_ascent --output-dir out --overwrite",
        "out/f.jsonl",
        "--forget",
    ),
    "unlearn, the retain set": (
        "unlearn --model myft --forget rows.jsonl --retain out/r.jsonl --output-dir out --overwrite",
        "out/r.jsonl",
        "--retain",
    ),
    "unlearn, refusals": (
        (
            "unlearn --model myft --forget rows.jsonl --refusal-file out/idk.txt --objective idk_nll --output-dir out "
            "--overwrite"
        ),
        "out/idk.txt",
        "--refusal-file",
    ),
    "unlearn, the checkpoint that it goes on from": (
        "unlearn --model myft --forget rows.jsonl --objective npo --resume-from-checkpoint out --output-dir out",
        "out/config.json",
        "--resume-from-checkpoint",
    ),
    "finetune, the model": (
        "finetune --model myft --data rows.jsonl --output-dir myft --overwrite",
        "myft/config.json",
        "--model",
    ),
    "finetune, the data": (
        "finetune --model myft --data out/d.jsonl --output-dir out --overwrite",
        "out/d.jsonl",
        "--data",
    ),
    "evaluate, the log that it compares with": (
        "evaluate --model myft --retain-log out/TOFU_EVAL.json --output out --overwrite",
        "out/TOFU_EVAL.json",
        "--retain-log",
    ),
    "evaluate, results that it compares with": (
        (
            "evaluate --model myft --metrics privleak --forget rows.jsonl --holdout rows.jsonl "
            "--retain-metrics out/METRICS_EVAL.json --output out --overwrite"
        ),
        "out/METRICS_EVAL.json",
        "--retain-metrics",
    ),
    "audit, its rows": (
        "audit --model myft --data out/AUDIT.json --output out --overwrite",
        "out/AUDIT.json",
        "--data",
    ),
    "report, a log": ("report runs.html --output runs.html", "runs.html", "log 1"),
    "report, the full model's": ("report out --full full.md --markdown full.md", "full.md", "--full"),
    "demo, its data": ("demo --data out/tofu --out out --overwrite", "out/tofu/full.json", "--data"),
    "tiny, its data": (
        "unlearn --recipe tofu-npo --scale smoke --data out/data --output-dir out --overwrite",
        "out/data/full.json",
        "--data",
    ),
    "sweep, a trial's model": (
        "sweep --model out/trials/a --forget rows.jsonl --objective grad_ascent --grid gamma=1,2 --output-dir out",
        "out/trials/a/config.json",
        "--model",
    ),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    written_rows(tmp_path / "rows.jsonl")
    (tmp_path / "link").symlink_to("myft")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base"}))
    return tmp_path


def put(path: Path, content: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


@pytest.mark.parametrize("case", REPLACES)
def test_an_input_is_never_replaced(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, there, flag = REPLACES[case]
    file = put(place / there)
    assert main(words.split()) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert flag in told
    assert "which would be replaced; choose another output" in told
    assert file.read_text() == "{}"


DANGLING = {
    "unlearn": "unlearn --model myft --forget rows.jsonl --objective grad_ascent --output-dir gone",
    "finetune": "finetune --model myft --data rows.jsonl --output-dir gone",
    "evaluate": "evaluate --model myft --output gone",
    "audit": "audit --model myft --data rows.jsonl --output gone",
    "demo": "demo --out gone",
    "sweep": "sweep --model m --forget rows.jsonl --objective grad_ascent --grid gamma=1,2 --output-dir gone",
    "report": "report . --output gone.html",
}


@pytest.mark.parametrize("command", DANGLING)
def test_a_dangling_link_is_not_an_output(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("gone", "gone.html"):
        (place / name).symlink_to("never/there")
    assert main(DANGLING[command].split()) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "a link to 'never/there', which does not exist" in told
    assert not (place / "never").exists()


def test_outputs_can_be_inside_folders_of_inputs(tmp_path: Path) -> None:
    """An output inside a model's folder, inside a data folder, and names that are not files."""
    put(tmp_path / "model" / "config.json")
    inputs = {"--model": tmp_path / "model", "--data": tmp_path, "--forget": "locuslab/TOFU:forget10", "--full": None}
    out = tmp_path / "model" / "unlearned"
    assert check_output(out, overwrite=False, inputs=inputs) == out
    refuse_inputs([tmp_path / "model" / "evaluation"], inputs)
    check_output(tmp_path / "model", overwrite=True, inputs=inputs, replaced=("TOFU_EVAL.json",))
    assert model_inputs("--model", "some/name", "v1") == {"--model": "some/name"}
    assert config_of(["--beta", "1", "--config", "a.yaml"]) == config_of(["--config=a.yaml"]) == "a.yaml"
    assert config_of(["--beta", "1"]) is None


def test_overwriting_keeps_the_old_checkpoints_until_the_new_model_is_whole(tmp_path: Path) -> None:
    put(tmp_path / "checkpoint-100" / "model.safetensors", "x" * 2048)
    put(tmp_path / "best" / "best.json")
    put(tmp_path / "model.safetensors")
    put(tmp_path / "notes.txt", "mine")
    folder = RunFolder(tmp_path, overwrite=True)
    assert folder.begin({"objective": "npo"}) is None
    assert checkpoints(tmp_path) == {}
    said = folder.replaced_in_words("model*.safetensors")
    assert said == "3 files, 2.00 KiB: best, checkpoint-100, model.safetensors"
    put(tmp_path / "checkpoint-3" / "model.safetensors")
    again = RunFolder(tmp_path, overwrite=True)  # another run, started before the new model was complete
    assert again.begin({"objective": "simnpo"}) is None
    assert again.removed == "1 file, 2 bytes: checkpoint-3"  # otherwise failing runs would fill the disk
    assert [path.name for path in sorted((tmp_path / REPLACED).iterdir())] == ["best", "checkpoint-100"]
    again.settle()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "notes.txt", "run.json"]
    assert in_words([tmp_path / "notes.txt"]) == "1 file, 4 bytes: notes.txt"


def test_overwriting_replaces_the_results_of_the_old_model(tmp_path: Path) -> None:
    """Otherwise a report would show the old model's results for the new model. Files of the user stay."""
    old = ("METRICS_EVAL.json", "evaluation/TOFU_EVAL.json", "evaluation/EVAL_CONFIG.json", "leaks/AUDIT.json")
    kept = ("model.safetensors", "leaks/notes.txt", "MY_EVAL.json", "evaluation/retain_model/TOFU_EVAL.json")
    runs = ("other-run/config.json", "other-run/TOFU_EVAL.json")
    for name in (*old, *kept, *runs):
        put(tmp_path / name)
    folder = RunFolder(tmp_path, overwrite=True)
    folder.begin({"objective": "npo"})
    assert not [name for name in old if (tmp_path / name).exists()]
    assert folder.replaced_in_words() == "4 files, 8 bytes: METRICS_EVAL.json, evaluation, leaks"
    put(tmp_path / "leaks" / "AUDIT.json")  # of an incomplete run, which another one replaces
    again = RunFolder(tmp_path, overwrite=True)
    again.begin({"objective": "simnpo"})
    assert again.removed == "1 file, 2 bytes: AUDIT.json"
    again.settle()
    assert not (tmp_path / REPLACED).exists()
    assert all((tmp_path / name).exists() for name in (*kept, *runs))


def test_every_results_file_is_known() -> None:
    names = (logs.CONFIG, find.AUDIT, *find.LOGS, "METRICS_EVAL.json", "FAME_EVAL.json")
    assert [name for name in names if not any(fnmatch(name, pattern) for pattern in RESULTS)] == []


def test_results_are_not_pushed_along(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(place / "out" / "evaluation" / "TOFU_EVAL.json")
    words = "unlearn --model myft --forget rows.jsonl --objective grad_ascent --output-dir out --overwrite"
    assert main([*words.split(), "--push-to-hub"]) == 2
    assert "contains results with questions and answers of the data, which would be pushed" in capsys.readouterr().err


# Results of evaluations


def facts(**changes: Any) -> dict[str, Any]:
    options = {"metrics": "perplexity", "forget": "f.json", "output": "out", "window": None, "holdout": None}
    config = {
        "model": "m",
        "fingerprint": "aa" * 16,
        "dtype": "torch.float32",
        "versions": {},
        "benchmark": "METRICS",
        "content": {},
        "options": options,
    }
    own = {name: value for name, value in changes.items() if name in config}
    return {**config, **own, "options": {**options, **{k: v for k, v in changes.items() if k not in own}}}


def test_results_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    write_results(tmp_path, {"perplexity": {"agg_value": 2.0}}, facts(), benchmark="METRICS")
    check_results(tmp_path, facts(metrics="mia_loss", holdout="h.json", window=16), benchmark="METRICS")
    message = (
        r"another model, 'm' \(torch.float32, fingerprint aaaaaaaa\); this model is 'n' \(torch.float32, fingerprint "
        r"bbbbbbbb\); choose another --output, or add --overwrite"
    )
    with pytest.raises(FileExistsError, match=message):
        check_results(tmp_path, facts(model="n", fingerprint="bb" * 16), benchmark="METRICS")
    with pytest.raises(FileExistsError, match=r"other settings: forget: was 'f.json', is 'g.json'; choose another"):
        check_results(tmp_path, facts(forget="g.json"), benchmark="METRICS")
    write_results(tmp_path, {"perplexity": {"agg_value": 2.0}}, facts(content={"forget": "a"}), benchmark="METRICS")
    check_results(tmp_path, facts(content={"forget": "a", "holdout": "c"}, holdout="h.json"), benchmark="METRICS")
    with pytest.raises(FileExistsError, match="content of forget: was 'a', is 'b'"):
        check_results(tmp_path, facts(content={"forget": "b"}), benchmark="METRICS")
    (tmp_path / "METRICS_CONFIG.json").unlink()
    with pytest.raises(FileExistsError, match="another model, 'unknown'"):
        check_results(tmp_path, facts(), benchmark="METRICS")


def test_new_metrics_of_the_same_model_are_added_to_the_old(tmp_path: Path) -> None:
    write_results(tmp_path, {"perplexity": {"agg_value": 2.0}}, facts(), benchmark="METRICS")
    more = facts(metrics="mia_loss", holdout="h.json")
    write_results(tmp_path, {"mia_loss": {"agg_value": 0.5}}, more, benchmark="METRICS", beside=True)
    assert read_json(tmp_path / "METRICS_SUMMARY.json", "summary") == {"mia_loss": 0.5, "perplexity": 2.0}
    options = read_json(tmp_path / "METRICS_CONFIG.json", "config")["options"]
    assert (options["metrics"], options["holdout"], options["forget"]) == ("perplexity,mia_loss", "h.json", "f.json")
    write_results(tmp_path, {"mia_loss": {"agg_value": 0.5}}, more, benchmark="METRICS")
    assert read_json(tmp_path / "METRICS_SUMMARY.json", "summary") == {"mia_loss": 0.5}


def test_two_concurrent_evaluations_are_a_one_line_error(tmp_path: Path) -> None:
    message = "another process is writing there; wait for it, or stop it"
    with (
        locked_folder(tmp_path / "out"),
        pytest.raises(FileExistsError, match=message),
        locked_folder(tmp_path / "out"),
    ):
        pass
    with locked_folder(tmp_path / "out"):
        pass


# Files


def test_private_files_are_private_from_the_first_byte(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with written_file(tmp_path / "a" / "b" / "file", private=True) as partial:
            assert partial.stat().st_mode & 0o777 == 0o600
            partial.write_text("text")
            assert take_lock(partial) is None  # locked, so that no process takes it for the leftover of a killed one
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "a", tmp_path / "a" / "b")] == [0o700, 0o700]
    assert (tmp_path / "a" / "b" / "file").stat().st_mode & 0o777 == 0o600
    (tmp_path / "mine").mkdir(mode=0o750)
    assert private_folder(tmp_path / "mine").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("start", ["=1+1", "+1", "-cmd", "@sum", "\ttab", "\rcr"])
def test_text_cells_are_not_formulas(start: str) -> None:
    text = io.StringIO()
    csv.writer(text).writerow(map(csv_cell, [start, -1.5, "plain - text", 3, ""]))
    (row,) = csv.reader(io.StringIO(text.getvalue(), newline=""))
    assert row == [f"'{start}", "-1.5", "plain - text", "3", ""]
