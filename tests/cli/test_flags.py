"""Tests of the flags: written with hyphens, accepted with underscores; short help by default, full help on request."""

import argparse
import ast
import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from efface.cli.main import COMMANDS, main
from efface.flags import FlagParser, flag_words, given_names, hyphens
from efface.recipes.flags import SettingsParser

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "engine" / "efface"
UNDERSCORED = re.compile(r"(?<![\w-])--[A-Za-z0-9]+_\w*")
# Arguments of transformers whose types cannot be given as text.
UNSAYABLE = {"liger_kernel_config", "parallelism_config"}
SETTINGS = ("unlearn", "finetune", "cache-reference")


def parser_of(command: str) -> FlagParser:
    """Return the parser of a command with no required flags."""
    parser: FlagParser = importlib.import_module(COMMANDS[command][0]).parser()
    for action in parser._actions:
        action.required = False
    return parser


def a_value(action: argparse.Action) -> list[str]:
    """Return words for a valid value of a flag."""
    if action.nargs == 0:
        return []
    if action.choices:
        return [str(next(iter(action.choices)))]
    return ["underflow_overflow" if action.dest == "debug" else "1"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_read_in_both_spellings(command: str) -> None:
    parser, seen = parser_of(command), 0
    beside = [] if parser._beside is None else [parser._beside]
    for each in (parser, *beside):
        for action in each._actions:
            if not action.option_strings or action.dest in {"help", "help_all", *UNSAYABLE}:
                continue
            for written in action.option_strings:
                assert "_" not in written
                underscored = "--" + written.removeprefix("--").replace("-", "_")
                values = a_value(action)
                apart, joined = [underscored, *values], [f"{underscored}={value}" for value in values] or [underscored]
                wanted = each.given([written, *values])
                assert action.dest in wanted
                assert each.given(apart) == each.given(joined) == wanted
                seen += 1
    assert seen > {"bench": -1, "completion": -1, "recipes": 0, "cache": 4}.get(command, 5)


@pytest.mark.parametrize("command", SETTINGS)
def test_a_file_of_flags_is_read_in_both_spellings(command: str) -> None:
    """Also ``no_evaluate: true``, which equals ``--no-evaluate`` on the command line."""
    parser = parser_of(command)
    assert isinstance(parser, SettingsParser)
    for action in parser._actions:
        for written in action.option_strings if action.dest in parser.names - UNSAYABLE else ():
            name, words = written.removeprefix("--"), a_value(action)
            value = words if action.nargs == "+" else yaml.safe_load(words[0]) if words else True
            read = parser.converted({name: value}, "a file")
            assert (
                read == parser.converted({name.replace("-", "_"): value}, "a file") == parser.given([written, *words])
            )
    assert parser.converted({"no-dataloader-pin-memory": False}, "a file") == {"dataloader_pin_memory": True}


def test_values_of_a_file_are_read_as_on_the_command_line() -> None:
    parser = parser_of("unlearn")
    assert isinstance(parser, SettingsParser)
    content = yaml.safe_load("{learning_rate: 2e-5, save_schedule: no, bf16: no, forget-filter: [a=1, b=2]}")
    content |= {"alpha": None, "lr_scheduler_kwargs": {"power": 2}, "lora_target": "q_proj", "max_steps": 3}
    values = parser.converted(content, "a file")
    assert values == {
        "learning_rate": 2e-5,
        "save_schedule": "no",
        "bf16": False,
        "forget_filter": ["a=1", "b=2"],
        "lr_scheduler_kwargs": '{"power": 2}',
        "lora_target": ["q_proj"],
        "max_steps": 3,
    }
    assert parser.given(flag_words(content)) == values
    for wrong, message in (
        (
            {"lerning-rate": 1},
            "f.yaml: expected flags of the command, got 'lerning-rate'; did you mean 'learning_rate'?",
        ),
        ({"learning_rate": "fast"}, "f.yaml: argument --learning-rate: invalid float value: 'fast'"),
        ({"learning_rate": [1, 2]}, "f.yaml: argument --learning-rate: expected one value, got [1, 2]"),
        ({"forget_filter": []}, "f.yaml: argument --forget-filter: expected values, got []"),
        ({"optim": "adam_magic"}, "f.yaml: argument --optim: invalid choice: 'adam_magic'"),
        ({"evaluate": 1, "no_evaluate": 1}, "f.yaml: expected each flag once, got 'evaluate' in two spellings"),
        ({"config": "other.yaml"}, "f.yaml: expected flags of the command, got 'config'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            parser.converted(wrong, "f.yaml")


def test_values_keep_their_underscores() -> None:
    parser = parser_of("unlearn")
    assert parser.given(["--forget_filter", "topic_id=3", "a_b!=c_d", "--answer_column=my_text"]) == {
        "forget_filter": ["topic_id=3", "a_b!=c_d"],
        "answer_column": "my_text",
    }
    assert given_names(["--retain-log=a", "--output_dir", "out_put"]) == {"retain_log", "output_dir"}
    assert parser_of("bench").given(["loss", "--some_flag", "x"])["options"] == ["--some_flag", "x"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_writes_hyphens(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("--help", "--help-all", "--help_all"):
        with pytest.raises(SystemExit, match="0"):
            main([command, word])
        said = capsys.readouterr().out
        assert said.startswith(f"usage: efface {command}")
        assert UNDERSCORED.findall(said) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_a_screen_and_a_half(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The usage takes one line, the description is for users, all flags are explained, examples are one per line."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert len(said.splitlines()) <= 75
    assert max(map(len, said.splitlines())) <= 100
    monkeypatch.setenv("COLUMNS", "88")  # as on the pages of docs/
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 88
    usage, between, description, *_ = said.splitlines()
    assert usage.startswith(f"usage: efface {command} ")
    assert (between, description[0]) == ("", description[0].upper())
    assert "``" not in said
    parser = parser_of(command)
    assert parser.epilog is not None
    assert parser.epilog.strip() in said
    assert parser.epilog.startswith("\nexamples:\n  efface ")
    assert [action.dest for action in parser._actions if not action.help and action.option_strings] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_read_by_their_parsers(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["efface"])
    epilog = importlib.import_module(COMMANDS[command][0]).parser().epilog.replace("\\\n", " ")
    lines = [
        shlex.split(line, comments=True)[1:] for line in re.findall(r"^  (efface .*)$", epilog, flags=re.MULTILINE)
    ]
    assert sum(words[0] == command for words in lines) in range(1, 5)
    for name, *rest in lines:
        words = rest[: rest.index(">")] if ">" in rest else rest
        if "--help" in words:  # printed by the suite's own parser
            continue
        parser: FlagParser = importlib.import_module(COMMANDS[name][0]).parser()
        unknown = parser.parse_known_args(words)[1]
        if parser._beside is not None:
            parser._beside.parse_args(unknown)
        else:
            assert not unknown


@pytest.mark.parametrize("command", SETTINGS)
def test_help_is_short_and_whole_if_asked(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shown = {}
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            main([command, word])
        shown[word] = capsys.readouterr().out
    parser = parser_of(command)
    written = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    assert [name for name in written if not re.search(rf"{name}\b", shown["--help-all"])] == []
    short = shown["--help"]
    assert len(short.splitlines()) < 0.3 * len(shown["--help-all"].splitlines())
    # efface's own flags come first
    whole = shown["--help-all"]
    assert whole.index("--model ") < whole.index("--learning-rate ") < whole.index("--adam-beta1 ")
    named = {
        "unlearn": ("--forget", "--pairs-per-step", "--lora-r", "--output"),
        "finetune": ("--data", "--from-config", "--learning-rate", "--output"),
        "cache-reference": ("--forget", "--reference-cache", "--objective"),
    }
    for name in ("--model", *named[command]):
        assert re.search(rf"^  {name} ", short, flags=re.MULTILINE)
    for name in ("--adam-beta1", "--no-evaluate", "--ddp-backend"):
        assert f"  {name}" not in short


def test_every_command_that_prints_a_table_prints_json_too() -> None:
    tables = {"audit", "cache", "demo", "evaluate", "plan", "recipes", "report", "sweep", "unlearn"}
    assert {name for name in COMMANDS if "--json" in parser_of(name).option_names()} == tables | {"cache-reference"}


OUTPUTS = {"unlearn": "output_dir", "finetune": "output_dir", "sweep": "output_dir", "cache-reference": "output_dir"}
OUTPUTS |= dict.fromkeys(("audit", "demo", "evaluate", "report"), "output")


def test_the_output_flag_has_one_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Other names are accepted: transformers' own, and those of earlier versions."""
    for command in COMMANDS:
        parser = parser_of(command)
        assert not {"--out", "--output-dir"} & set(parser.option_names())
        assert ("--output" in parser.option_names()) == (command in OUTPUTS)
        for name in ("--output", "--output-dir", "--output_dir", "--out") if command in OUTPUTS else ():
            for words in ([name, "there"], [f"{name}=there"]):
                value = parser.parse_known_args([*words, *(["x"] if command == "report" else [])])[0]
                assert str(getattr(value, OUTPUTS[command])) == "there"
    parser = parser_of("unlearn")
    assert isinstance(parser, SettingsParser)
    for name in ("output", "output-dir", "output_dir"):
        assert parser.converted({name: "there"}, "a file") == {"output_dir": "there"}
    for words in (["--output", "a"], ["--output_dir=a"]):
        sweep = ["sweep", "--model=a/b", "--forget=a/c", "--retain=a/d", "--grid", "beta=1", "--output=a"]
        assert main([*sweep, f"--evaluation={shlex.join(words)}"]) == 2
        assert "is set by each trial; drop it" in capsys.readouterr().err


def test_help_all_of_a_sweep_shows_the_flags_it_passes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["sweep", "--help-all"])
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in ("--grid", "--retry-failed", "--learning-rate", "--adam-beta1"))


def test_texts_write_hyphens() -> None:
    """Pages, examples and messages of the package write flags with hyphens."""
    texts: dict[Path, list[str]] = {
        path: [path.read_text(encoding="utf-8")]
        for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ENGINE.rglob("*.md"), *ENGINE.rglob("*.yaml"))
    }
    for path in ENGINE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        texts[path] = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    found = {(path.name, flag) for path, said in texts.items() for text in said for flag in UNDERSCORED.findall(text)}
    # the code that hides secrets needs both spellings
    assert found == {("record.py", "--hub_token"), ("record.py", "--push_to_hub_token")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *(
            (
                ["cache-reference", "--model", "x", "--forget", "x", flag],
                f"{flag}: not a flag of `efface cache-reference`",
            )
            for flag in ("--json", "--dry-run")
        ),
        (["plan", "--tokenizer", "x"], "the following arguments are required: --forget"),
        (
            ["evaluate", "--model", "x", "--retain_lgo", "y"],
            "unknown arguments --retain_lgo y; did you mean '--retain-log'?",
        ),
        (["report", "a", "--nothing-like-it"], "unknown arguments --nothing-like-it; see `efface report --help`"),
        (["unlearn", "--learning_rate", "fast"], "argument --learning-rate: invalid float value: 'fast'"),
        (["unlearn", "--forget", "x"], "the following arguments are required: --model"),
        (["finetune"], "the following arguments are required: --model, --data"),
        (["finetune", "--config"], "--config: expected the path of a YAML file, got nothing"),
        *(
            ([command, "--output", "", *(["x"] if command == "report" else [])], "argument --output: expected a path")
            for command in OUTPUTS
        ),
        *(
            (
                [command, "--token-budget", value],
                f"argument --token-budget: expected a whole number >= 1, got {value!r}",
            )
            for command in ("audit", "evaluate")
            for value in ("0", "-1", "x")
        ),
        *(
            ([command, "--seed", value], f"argument --seed: expected 0 .. 4294967295, got '{value}'")
            for command in ("audit", "demo", "finetune", "plan", "unlearn")
            for value in ("-1", "4294967296")
        ),
    ],
)
def test_wrong_use_of_any_command_is_reported(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert f"efface {words[0]}: error: {message}" in capsys.readouterr().err


def test_a_flag_in_two_spellings_in_all_layers(tmp_path: Path) -> None:
    """The command line overrides the file, and the file the recipe, in whichever spelling."""
    from efface.recipes.settings import parse

    recipe, config = tmp_path / "recipe.yaml", tmp_path / "run.yaml"
    unlearn: dict[str, Any] = {"model": "a/b", "forget": "a/c", "retain": "a/d", "objective": "simnpo", "beta": 2}
    unlearn |= {"learning-rate": 1e-5, "warmup-epochs": 1, "weight-decay": 0.5}
    recipe.write_text(yaml.safe_dump({"about": "x", "unlearn": unlearn, "evaluate": {"benchmark": "none"}}))
    config.write_text("learning-rate: 2e-5\nwarmup_steps: 7\nno-evaluate: true\n")
    words = ["--recipe", str(recipe), "--config", str(config), "--dry_run", f"--output_dir={tmp_path}"]
    command, args = parse([*words, "--weight_decay", "0.25"])
    assert (args.learning_rate, args.warmup_epochs, args.warmup_steps, args.weight_decay) == (2e-5, None, 7, 0.25)
    assert (command.evaluate, command.beta, args.output_dir) == (False, 2.0, str(tmp_path))
    command, args = parse([*words, "--learning_rate=3e-5", "--evaluate", "--objective", "Sim_NPO"])
    assert (args.learning_rate, command.evaluate, command.beta) == (3e-5, True, 2.0)
    assert hyphens("a_b") == "a-b"
