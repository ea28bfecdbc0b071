"""Damaged files of every kind, given to every command that reads them: one line with a remedy, and no traceback."""

import hashlib
import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from efface.cli.main import COMMANDS, EXIT_USAGE, main
from support.helpers import TEXTS, saved_llama, tiny_llama, written_rows

Damage = Callable[[Path], object]
SHARE = 1 if "EFFACE_LONG" in os.environ else 5

# ---- commands, by the damaged input; they run in a folder with `model/`, `good.json` and `keep.json`

_TRAIN = "--output-dir out --use-cpu True --max-steps 1 --save-strategy no"
_RUN = f"--model model --retain keep.json {_TRAIN} --reference-cache none"
_METRICS = "--metrics probability --max-new-tokens 2 --output out"

ROWS_COMMANDS = {
    "plan": "plan --tokenizer model --forget {}",
    "plan retain": "plan --tokenizer model --forget good.json --retain {}",
    "unlearn": f"unlearn {_RUN} --forget {{}}",
    "dry run": f"unlearn {_RUN} --forget {{}} --dry-run",
    "cache-reference": "cache-reference --model model --use-cpu True --forget {}",
    "finetune": f"finetune --model model {_TRAIN} --data {{}}",
    "evaluate": f"evaluate --model model --forget {{}} {_METRICS}",
    "fame": "evaluate --model model --benchmark fame --data {} --forget-filter question=a --output out",
    "audit": "audit --model model --data {} --views direct --max-new-tokens 2 --output out",
    "sweep": f"sweep {_RUN} --forget {{}} --grid beta=.1,.2 --dry-run",
}
MODEL_COMMANDS = {
    "unlearn": f"unlearn {_RUN} --forget good.json",
    "finetune": f"finetune --model model {_TRAIN} --data good.json",
    "cache-reference": "cache-reference --model model --use-cpu True --forget good.json",
    "evaluate": f"evaluate --model model --forget good.json {_METRICS}",
    "audit": "audit --model model --data good.json --views direct --max-new-tokens 2 --output out",
}
TOKENIZER_COMMANDS = {**MODEL_COMMANDS, "plan": "plan --tokenizer model --forget good.json"}
YAML_COMMANDS = {
    "unlearn": f"unlearn {_RUN} --forget good.json --config {{}}",
    "finetune": f"finetune --model model {_TRAIN} --data good.json --config {{}}",
    "cache-reference": "cache-reference --model model --use-cpu True --forget good.json --config {}",
    "sweep": f"sweep {_RUN} --forget good.json --grid beta=.1,.2 --dry-run --config {{}}",
    "recipe": "unlearn --output-dir out --use-cpu True --recipe {}",
    "recipes": "recipes {}",
    "tiny": "unlearn --scale smoke --output-dir out --recipe {}",
    "preset": f"sweep {_RUN} --forget good.json --dry-run --preset {{}}",
}
LOG_COMMANDS = {
    "report": "report {} --output out.html",
    "report retain": "report log.json --retain-log {} --output out.html",
    "report full": "report log.json --full {} --output out.html",
    "evaluate retain": "evaluate --model model --data tofu --retain-log {} --output out",
    "retain metrics": "evaluate --model model --forget good.json --holdout keep.json --metrics privleak"
    " --retain-metrics {} --output out",
    "sweep full": f"sweep {_RUN} --forget good.json --grid beta=.1,.2 --full-log {{}}",
}

# ---- damage

_GOOD = "".join(json.dumps(row) + "\n" for row in TEXTS).encode()
_CSV = "question,answer\nWo?,In Málaga.\n"

ROWS: dict[str, tuple[str, bytes]] = {
    "json empty": (".json", b""),
    "json blank": (".json", b" \n\n"),
    "json cut": (".json", _GOOD[:-20]),
    "json nul": (".json", b"\0" * 512),
    "json comma": (".json", b'[{"question":"a","answer":"b"},]'),
    "json no rows": (".json", b"[]"),
    "json number": (".json", b"1\n"),
    "json null": (".json", b"null\n"),
    "json list of texts": (".json", b'["a", "b"]'),
    "json list of lists": (".json", b'[[{"question":"a","answer":"b"}]]'),
    "json columns": (".json", b'{"question": ["a", "b"], "answer": ["c", "d"]}\n'),
    "json nested answer": (".json", b'{"question":"a","answer":{"text":"b"}}\n'),
    "json null answer": (".json", b'{"question":"a","answer":null}\n'),
    "json bool": (".json", b'{"question":"a","answer":true}\n'),
    "json deep": (".json", b"[" * 100_000),
    "json deep value": (".json", b'{"question":"a","answer":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"),
    "json surrogate": (".json", b'{"question":"a","answer":"x \\ud83d"}\n'),
    "json latin1": (".json", '{"question":"a","answer":"é"}\n'.encode("latin-1")),
    "json utf16": (".json", '{"question":"a","answer":"b"}\n'.encode("utf-16")),
    "json utf32": (".json", '{"question":"a","answer":"b"}\n'.encode("utf-32")),
    "json other column": (".json", b'{"frage":"a","antwort":"b"}\n'),
    "json gap": (".json", b'{"question":"a","answer":"b"}\n{"question":"a"}\n'),
    "jsonl gzip": (".jsonl", bytes.fromhex("1f8b0800") + b"\xff" * 64),
    "jsonl single quotes": (".jsonl", b"{'question': 'a', 'answer': 'b'}\n"),
    "jsonl twice": (".jsonl", b'{"question":"a","question":"b","answer":"c"}\n'),
    "csv empty": (".csv", b""),
    "csv header": (".csv", b"question,answer\n"),
    "csv latin1": (".csv", _CSV.encode("cp1252")),
    "csv utf16": (".csv", _CSV.encode("utf-16")),
    "csv utf16 without mark": (".csv", _CSV.encode("utf-16-le")),
    "csv quote": (".csv", b'question,answer\na,"b\nc,d\n'),
    "csv semicolons": (".csv", b"question;answer\na;b\n"),
    "csv ragged": (".csv", b"question,answer\na,b,c\n"),
    "csv nul": (".csv", b"question,answer\na,b\0c\n\0\0\n"),
    "csv binary": (".csv", bytes(range(256))),
    "parquet empty": (".parquet", b""),
    "parquet text": (".parquet", b"question,answer\na,b\n"),
    "parquet magic": (".parquet", b"PAR1" + b"\xff" * 64 + b"PAR1"),
    "txt": (".txt", b"a\n"),
    "no suffix": ("", b"a\n"),
}


YAML: dict[str, bytes] = {
    "list": b"- 1\n",
    "scalar": b"npo\n",
    "unclosed": b"a: [1\n",
    "tab": b"a:\n\t- 1\n",
    "latin1": "objective: é\n".encode("latin-1"),
    "utf16": "objective: npo\n".encode("utf-16-le"),
    "nul": b"\0" * 64,
    "tag": b"!!python/object/apply:os.system ['true']\n",
    "typo": b"lerning_rate: 1\n",
    "number as key": b"1: 2\n",
    "mapping as key": b"{a: b}: c\n",
    "list as key": b"? [a]\n: c\n",
    "deep": b"a: " + b"[" * 10_000,
    "alias": b"a: *b\n",
    "two documents": b"a: 1\n---\nb: 2\n",
    "date": b"learning_rate: 2020-02-30\n",
    "wrong type": b"learning_rate: [1, 2]\n",
    "word": b"learning_rate: fast\n",
    "mapping": b"learning_rate: {a: b}\n",
    "merge": b"<<: 1\n",
    "twice": b"beta: 1\nbeta: 2\n",
}
LOGS: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"forget_truth_ratio": {"agg_value": 0.5, "value_by_ind',
    "list": b"[1, 2]",
    "number": b"1",
    "null": b"null",
    "nothing": b"{}",
    "latin1": '{"é": 1}'.encode("latin-1"),
    "utf16": '{"a": 1}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "binary": bytes(range(256)),
    "rows are a list": b'{"forget_truth_ratio": {"agg_value": 0.5, "value_by_index": [1]}}',
    "rows are numbers": b'{"forget_truth_ratio": {"agg_value": 0.5, "value_by_index": {"0": 1}}}',
    "rows are texts": b'{"forget_truth_ratio": {"value_by_index": {"0": {"score": "x"}}}}',
    "rows are lists": b'{"forget_truth_ratio": {"value_by_index": {"0": {"score": [1]}}}}',
    "old, list": b'{"eval_log_forget.json": [1]}',
    "old, text": b'{"eval_log_forget.json": {"avg_gt_loss": {"0": "x"}}}',
    "old, ragged": b'{"eval_log_forget.json": {"avg_gt_loss": {"0": 1}, "avg_paraphrased_loss": {"0": 1},'
    b' "average_perturb_loss": {"0": [1], "1": [1, 2]}}}',
}


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def _binary(folder: Path, content: bytes) -> None:
    _weights(folder).unlink()
    (folder / "pytorch_model.bin").write_bytes(content)


def _index(folder: Path, content: str) -> None:
    _weights(folder).unlink()
    (folder / "model.safetensors.index.json").write_text(content)


def _config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


class _Command:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return eval, ("1/0",)


def _adapter(folder: Path, weights: bytes | None = None, config: str | None = None) -> None:
    peft = pytest.importorskip("peft")
    shutil.copytree(folder, folder.with_name("base"))
    peft.get_peft_model(tiny_llama(vocab_size=300), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(
        folder.with_name("adapter")
    )
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    for path in folder.with_name("adapter").iterdir():
        path.rename(folder / path.name)
    if weights is not None:
        (folder / "adapter_model.safetensors").write_bytes(weights)
    found = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        config if config is not None else json.dumps({**found, "base_model_name_or_path": "base"})
    )


MODELS: dict[str, Damage] = {
    "weights empty": lambda f: _weights(f).write_bytes(b""),
    "weights cut": lambda f: _weights(f).write_bytes(_weights(f).read_bytes()[:-1000]),
    "weights cut in the header": lambda f: _weights(f).write_bytes(_weights(f).read_bytes()[:300]),
    "weights nul": lambda f: _weights(f).write_bytes(b"\0" * 4096),
    "weights garbage": lambda f: _weights(f).write_bytes(b"\xff" * 4096),
    "weights header": lambda f: _weights(f).write_bytes((2).to_bytes(8, "little") + b"[]"),
    "weights pointer": lambda f: _weights(f).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "weights missing": lambda f: _weights(f).unlink(),
    "weights folder": lambda f: (_weights(f).unlink(), _weights(f).mkdir()),
    "weights pickled": lambda f: _binary(f, pickle.dumps(_Command())),
    "weights pickled by torch": lambda f: (
        torch.save({"lm_head.weight": _Command()}, f / "w"),
        _binary(f, (f / "w").read_bytes()),
        (f / "w").unlink(),
    ),
    "bin empty": lambda f: _binary(f, b""),
    "bin garbage": lambda f: _binary(f, b"\xff" * 4096),
    "bin cut": lambda f: (
        torch.save({"lm_head.weight": torch.ones(96, 32)}, f / "w"),
        _binary(f, (f / "w").read_bytes()[:-200]),
        (f / "w").unlink(),
    ),
    "bin list": lambda f: (torch.save([1], f / "w"), _binary(f, (f / "w").read_bytes()), (f / "w").unlink()),
    "index broken": lambda f: _index(f, '{"weight_map": '),
    "index list": lambda f: _index(f, "[]"),
    "index without map": lambda f: _index(f, "{}"),
    "index map list": lambda f: _index(f, '{"metadata": {}, "weight_map": []}'),
    "shard missing": lambda f: _index(f, '{"metadata": {}, "weight_map": {"lm_head.weight": "model-1.safetensors"}}'),
    "config empty": lambda f: (f / "config.json").write_bytes(b""),
    "config cut": lambda f: (f / "config.json").write_bytes((f / "config.json").read_bytes()[:100]),
    "config list": lambda f: (f / "config.json").write_bytes(b"[]"),
    "config null": lambda f: (f / "config.json").write_bytes(b"null"),
    "config nothing": lambda f: (f / "config.json").write_bytes(b"{}"),
    "config latin1": lambda f: (f / "config.json").write_bytes('{"model_type": "é"}'.encode("latin-1")),
    "config utf16": lambda f: (f / "config.json").write_bytes((f / "config.json").read_text().encode("utf-16")),
    "config missing": lambda f: (f / "config.json").unlink(),
    "config folder": lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
    "config of no type": lambda f: _config(f, model_type=None, architectures=None),
    "config of unknown type": lambda f: _config(f, model_type="llama9"),
    "config of a number": lambda f: _config(f, model_type=3),
    "config of no decoder": lambda f: _config(f, model_type="vit"),
    "config word": lambda f: _config(f, hidden_size="large"),
    "config negative": lambda f: _config(f, hidden_size=-1),
    "config heads": lambda f: _config(f, num_attention_heads=0),
    "config null size": lambda f: (f / "config.json").write_text(
        json.dumps({**json.loads((f / "config.json").read_text()), "vocab_size": None})
    ),
    "config activation": lambda f: _config(f, hidden_act="silly"),
    "config rope": lambda f: _config(f, rope_scaling=[1], rope_parameters=[1]),
    "config dtype": lambda f: _config(f, dtype="float33", torch_dtype="float33"),
    "config layers": lambda f: _config(f, num_hidden_layers=9),
    "config code": lambda f: _config(
        f, model_type="other", auto_map={"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}
    ),
    "generation config": lambda f: (f / "generation_config.json").write_bytes(b"{"),
    "generation config list": lambda f: (f / "generation_config.json").write_bytes(b"[]"),
    "adapter weights cut": lambda f: _adapter(f, weights=b"\0" * 100),
    "adapter weights empty": lambda f: _adapter(f, weights=b""),
    "adapter config": lambda f: _adapter(f, config="{"),
    "adapter config list": lambda f: _adapter(f, config="[]"),
    "adapter config nothing": lambda f: _adapter(f, config="{}"),
    "adapter of unknown type": lambda f: _adapter(
        f, config='{"peft_type": "LORA9", "base_model_name_or_path": "base", "task_type": "CAUSAL_LM"}'
    ),
    "adapter base missing": lambda f: _adapter(
        f, config='{"peft_type": "LORA", "base_model_name_or_path": "./nowhere", "target_modules": ["q_proj"]}'
    ),
}
TOKENIZERS: dict[str, Damage] = {
    "tokenizer empty": lambda f: (f / "tokenizer.json").write_bytes(b""),
    "tokenizer cut": lambda f: (f / "tokenizer.json").write_bytes((f / "tokenizer.json").read_bytes()[:500]),
    "tokenizer nothing": lambda f: (f / "tokenizer.json").write_bytes(b"{}"),
    "tokenizer list": lambda f: (f / "tokenizer.json").write_bytes(b"[]"),
    "tokenizer latin1": lambda f: (f / "tokenizer.json").write_bytes(b'{"\xe9": 1}'),
    "tokenizer missing": lambda f: [path.unlink() for path in f.glob("*token*")],
    "tokenizer config": lambda f: (f / "tokenizer_config.json").write_bytes(b"{"),
    "tokenizer config list": lambda f: (f / "tokenizer_config.json").write_bytes(b"[]"),
    "tokenizer config null": lambda f: (f / "tokenizer_config.json").write_bytes(b"null"),
    "tokenizer class": lambda f: (f / "tokenizer_config.json").write_text('{"tokenizer_class": "NoTokenizer"}'),
    "tokenizer template": lambda f: (f / "chat_template.jinja").write_text("{% if %}"),
    "tokenizer vocabulary": lambda f: (f / "tokenizer.json").write_text(
        json.dumps(
            {**json.loads((f / "tokenizer.json").read_text()), "model": {"type": "BPE", "vocab": 3, "merges": []}}
        )
    ),
    "special tokens": lambda f: (f / "special_tokens_map.json").write_text("{"),
}


def written(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


_STATE = f"{_RUN.replace('--save-strategy no', '--save-schedule 1')} --forget good.json".replace("--max-steps 1", "")
_RESUME = f"unlearn {_STATE} --max-steps 2 --resume-from-checkpoint ck/checkpoint-1"
_STUDY = f"sweep {_RUN} --forget good.json --grid beta=.1,.2"
STORES = {
    "reference cache": (f"unlearn {_STATE} --reference-cache bad.sqlite", "bad.sqlite"),
    "cache-reference": (f"{MODEL_COMMANDS['cache-reference']} --reference-cache bad.sqlite", "bad.sqlite"),
    "rows of evaluate": (MODEL_COMMANDS["evaluate"], "out/.rows.sqlite"),
    "rows of audit": (MODEL_COMMANDS["audit"], "out/audit_rows.sqlite"),
    "study": (_STUDY, "out/study.db"),
}
OUTPUTS = {
    "unlearn": MODEL_COMMANDS["unlearn"],
    "finetune": MODEL_COMMANDS["finetune"],
    "evaluate": MODEL_COMMANDS["evaluate"],
    "audit": MODEL_COMMANDS["audit"],
    "sweep": _STUDY,
    "demo": "demo --scale smoke --output out",
    "tiny": "unlearn --scale smoke --recipe tofu-npo --output out",
}


def damaged_store(name: str, content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        (folder / "out" / "study.lock").touch() if name.endswith(".db") else None

    return damage


def more_cases() -> Iterator[tuple[str, str, Damage]]:
    """Yield damaged stores, checkpoints and outputs, and paths that only look like a name on the Hub."""
    for label, (words, name) in STORES.items():
        for damage, content in {"garbage": b"\xff" * 500, "cut": b"SQLite format 3\0" + b"\xff" * 84}.items():
            yield f"{label}: {damage}", words, damaged_store(name, content)
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "model.safetensors"):
        for damage, content in {"empty": b"", "garbage": b"\xff" * 500}.items():
            yield f"resume: {name} {damage}", _RESUME, written(f"ck/checkpoint-1/{name}", content)
    yield "resume: state is a list", _RESUME, written("ck/checkpoint-1/trainer_state.json", b"[]")
    yield "resume: nothing", _RESUME, lambda folder: shutil.rmtree(folder / "ck")
    yield "resume: a file", _RESUME.replace("ck/checkpoint-1", "good.json"), lambda _: None
    for label, words in OUTPUTS.items():
        yield f"{label}: output is a file", words, written("out", b"x")
        yield f"{label}: output is a link to nothing", words, lambda folder: (folder / "out").symlink_to("nowhere")
    named = {"rows": "plan --tokenizer model --forget {}", "tokenizer": "plan --forget good.json --tokenizer {}"}
    named |= {"model": MODEL_COMMANDS["unlearn"].replace("--model model", "--model {}"), "report": "report {}"}
    for label, words in named.items():
        for name in ("./x", "/nowhere/x.json", "x.txt", "~/nope", "link.json", "x.safetensors", "model/x/y", "x.yaml"):
            yield f"{label}: {name}", words.format(name), lambda folder: (folder / "link.json").symlink_to("nowhere")
    yield "rows: a model", named["rows"].format("model"), lambda _: None
    yield "model: rows", named["model"].format("good.json"), lambda _: None


def cases() -> Iterator[tuple[str, str, Damage]]:
    """Yield name, words and damage. The first command of a kind gets all damages, the others a share of them."""
    rows = {name: (f"bad{suffix}", content) for name, (suffix, content) in ROWS.items()}
    files = (
        (ROWS_COMMANDS, rows),
        (YAML_COMMANDS, {f"yaml {name}": ("bad.yaml", content) for name, content in YAML.items()}),
        (LOG_COMMANDS, {f"log {name}": ("bad.json", content) for name, content in LOGS.items()}),
    )
    for commands, damages in files:
        for i, (label, command) in enumerate(commands.items()):
            for j, (damage, (name, content)) in enumerate(damages.items()):
                if not i or commands is LOG_COMMANDS or (i + j) % SHARE == 0:
                    yield f"{label}: {damage}", command.format(name), written(name, content)
    for commands, changes in ((MODEL_COMMANDS, MODELS), (TOKENIZER_COMMANDS, TOKENIZERS)):
        for i, (label, command) in enumerate(commands.items()):
            for j, (damage, change) in enumerate(changes.items()):
                if not i or (i + j) % SHARE == 0:
                    yield f"{label}: {damage}", command, lambda folder, change=change: change(folder / "model")


CASES = {name: (words, damage) for name, words, damage in itertools.chain(cases(), more_cases())}


def test_there_are_more_than_300_cases() -> None:
    assert len(CASES) > 300
    without_files = {"bench", "cache", "completion"}
    assert {words.split()[0] for words, _ in CASES.values()} == set(COMMANDS) - without_files


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command would succeed."""
    folder = tmp_path_factory.mktemp("whole")
    saved_llama(folder / "model")
    written_rows(folder / "good.json", TEXTS[:2])
    written_rows(folder / "keep.json", TEXTS[2:])
    log = {"forget_truth_ratio": {"agg_value": 0.5, "value_by_index": {"0": {"score": 0.5}, "1": {"score": 0.25}}}}
    (folder / "log.json").write_text(json.dumps(log))
    words = f"{_STATE} --max-steps 1".replace("--output-dir out", "--output-dir ck")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["unlearn", *words.split()]) == 0
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("name", CASES)
def test_one_line(
    name: str,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, damage = CASES[name]
    folder = tmp_path / "here"
    shutil.copytree(whole, folder)
    damage(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("efface.cli.progress.PAUSE", 3600.0)  # no progress lines, even on a slow machine
    before = digests(folder)
    capsys.readouterr()
    code = main(words.split())
    said = capsys.readouterr().err
    assert code == EXIT_USAGE
    command = words.split()[0]
    assert "Traceback" not in said
    assert said.startswith(f"efface {command}: error: ")
    assert said.count("\n") == 1
    assert digests(folder) == before
