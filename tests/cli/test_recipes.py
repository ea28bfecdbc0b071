"""Tests of recipes: their files against the published settings, dry runs without network, and rejected input."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from efface.batching import packed_size, plan_epoch
from efface.cli.main import main
from efface.flags import flag_words
from efface.hf.model.head import fuse, packed_hidden
from efface.hf.text.data import token_store
from efface.hf.train.arguments import UnlearnArguments
from efface.hf.train.estimate import RunShape, memory, model_sizes, optimizer_bytes
from efface.objectives import known_objectives
from efface.recipes import known_recipes, load_recipe, local_source
from efface.recipes.settings import not_overridden, parse
from support.helpers import TEXTS, arguments, tiny_llama, tiny_model, tiny_tokenizer, unlabelled, written_rows

# The published settings of the five systems, typed in from the project's notes, with their names and values.
PUBLISHED: dict[str, dict[str, Any]] = {
    "npo-tofu-forget10-llama-3.2-1b": {
        "model": "open-unlearning/tofu_Llama-3.2-1B-Instruct_full",
        "forget": "locuslab/TOFU:forget10:train",
        "retain": "locuslab/TOFU:retain90:train",
        "system prompt": "You are a helpful assistant.",
        "date": "10 Apr 2025",
        "method": "NPO",
        "lr": "5e-5",
        "beta": "0.1",
        "alpha": "2",
        "gamma": "1",
        "epochs": "10",
        "effective batch": "32",
        "wd": "0.01",
        "warm-up": "1 epoch",
        "schedule": "linear",
        "optimizer": "paged AdamW 32 bit",
        "precision": "bf16",
        "seed": "0",
        "published model_utility": "0.56",
        "published model_utility_full": "0.601",
        "published model_utility_retain90": "0.591",
        "steps": "130",
        "warm-up steps": "12",
    },
    "graddiff-fame-topics-llama-3.2-3b": {
        "model": "ClaudioSavelli/FAME-topics_base_llama32-3b-instruct-qa",
        "forget filter": "topic_id=3",
        "retain filter": "topic_id!=3",
        "method": "GradDiff",
        "gamma": "1",
        "alpha": "1",
        "lr": "1e-5",
        "epochs": "5",
        "wd": "0.01",
        "effective batch": "32",
        "warm-up": "1 epoch",
    },
    "simnpo-tofu-forget05-llama-2-7b": {
        "model": "OPTML-Group/TOFU-origin-Llama-2-7b-chat",
        "forget": "locuslab/TOFU:forget05:train",
        "retain": "locuslab/TOFU:retain95:train",
        "template": "llama-2",
        "method": "SimNPO",
        "lr": "1e-5",
        "beta": "2.5",
        "gamma": "0.1375",
        "delta": "0",
        "alpha": "1",
        "epochs": "10",
        "effective batch": "32",  # 8 GPUs x 1 x 4
        "wd": "0.01",
        "warm-up": "1 epoch",
        "warm-up steps": "6",
        "seed": "1,001".replace(",", ""),
        "precision": "bf16",
        "published forget_quality": "0.99",
        "published model_utility": "0.58",
        "published model_utility_full": "0.62",
        "published forget_quality_npo": "0.79",
        "published model_utility_npo": "0.57",
    },
    "npo-tofu-forget10-llama-3.2-3b": {
        "model": "open-unlearning/tofu_Llama-3.2-3B-Instruct_full",
        "method": "NPO",
        "lr": "2e-5",
        "beta": "0.1",
        "alpha": "2",
        "epochs": "5",
        "published forget_quality": "0.468",
        "published model_utility": "0.621",
        "published novel_recall_leak": "0.0613",
        "published novel_recall_leak_full": "0.0785",
    },
    "graddiff-tofu-forget01-phi-1.5": {
        "model": "locuslab/tofu_ft_phi-1.5",
        "forget": "locuslab/TOFU:forget01:train",
        "retain": "locuslab/TOFU:retain99:train",
        "template": "phi",
        "method": "GradDiff",
        "alpha": "1",
        "gamma": "1",
        "lr": "1e-5",
        "epochs": "5",
        "effective batch": "32",
        "wd": "0.01",
        "seed": "42",
        "checkpoints": "every epoch, all kept",
    },
}

# open-unlearning's defaults, typed in as well
METHODS: dict[str, dict[str, Any]] = {
    "tofu-npo": {"method": "NPO", "beta": "0.1", "alpha": "1", "gamma": "1"},
    "tofu-dpo": {"method": "DPO", "beta": "0.1", "alpha": "1", "gamma": "1"},
    "tofu-idk_nll": {"method": "IdkNLL", "alpha": "1", "gamma": "1"},
    "tofu-simnpo": {"method": "SimNPO", "beta": "4.5", "gamma": "0.125", "delta": "0", "alpha": "1"},
    "tofu-graddiff": {"method": "GradDiff", "alpha": "1", "gamma": "1", "retain_loss_type": "NLL"},
    "tofu-graddiff-kl": {"method": "GradDiff", "retain_loss_type": "KL", "reference": "live"},
    "tofu-grad_ascent": {"method": "GradAscent", "gamma": "1"},
    "tofu-undial": {"method": "UNDIAL", "lr": "1e-4", "beta": "10", "alpha": "0"},
    "tofu-wga": {"method": "WGA", "beta": "1"},
    "tofu-satimp": {"method": "SatImp", "beta1": "5", "beta2": "1", "gamma": "0.1", "alpha": "1"},
    "tofu-ceu": {"method": "CEU", "ignore_first_n_answer_tokens": "1"},
    "tofu-rmu": {
        "method": "RMU",
        "steering_coeff": "2",
        "module_regex": r"model\.layers\.7",
        "retain_loss_type": "EMBED_DIFF",
    },
    "tofu-pdu": {"method": "PDU", "dual_step_size": "1", "dual_warmup_epochs": "5", "dual_update_upon": "step"},
}


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a dry run opened a socket")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def dry_run(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Return the printed name and value of every line of a dry run."""
    code = main(["unlearn", *words, "--dry-run"])
    out, err = capsys.readouterr()
    assert code == 0, err
    pairs = (line.strip().split("  ", 1) for line in out.splitlines() if line.startswith("  ") and "  " in line.strip())
    return {name: value.strip() for name, value in pairs}


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize("name", [*PUBLISHED, *METHODS])
def test_a_dry_run_prints_the_published_settings_without_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for loader in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", lambda *args, **kwargs: pytest.fail("a dry run loaded a model"))
    lines = dry_run(["--recipe", name], capsys)
    for key, value in {**PUBLISHED, **METHODS}[name].items():
        assert lines[key] == value, key
    assert lines["recipe"] == name
    assert lines["total"].endswith(" GiB")
    assert lines["tokens"].startswith("not known: the tokenizer of")
    assert not list(tmp_path.iterdir())  # not even an output folder


def test_there_is_a_recipe_for_every_method() -> None:
    recipes = {name: load_recipe(name) for name in known_recipes()}
    assert PUBLISHED.keys() | METHODS.keys() == recipes.keys()
    assert {recipe.unlearn["objective"] for recipe in recipes.values()} == known_objectives().keys()
    for recipe in recipes.values():
        assert recipe.about
        assert recipe.source
        wanted = {"model", "revision", "forget", "retain", "template", "objective", "learning_rate", "optim", "seed"}
        wanted |= {"lr_scheduler_type", "warmup_epochs", "num_train_epochs", "pairs_per_step", "dtype", "save_schedule"}
        assert wanted <= recipe.unlearn.keys()


def test_the_rows_of_recipes_are_those_of_the_files(tofu: Path) -> None:
    for name in known_recipes():
        recipe = load_recipe(name)
        for role in ("forget", "retain") if "TOFU" in recipe.unlearn["forget"] else ():
            file = Path(local_source(recipe.unlearn[role], tofu, f"--{role}"))
            assert len(file.read_text().splitlines()) == recipe.rows[role], (name, role)


def test_parameters_of_the_architectures() -> None:
    """The exact numbers of parameters on the models' cards."""
    known = yaml.safe_load((Path(load_recipe("tofu-npo").path).parent / "architectures.yaml").read_text())
    counted = {name: model_sizes(fields, torch.bfloat16).parameters for name, fields in known.items()}
    assert counted == {
        "llama-3.2-1b": 1_235_814_400,
        "llama-3.2-3b": 3_212_749_824,
        "llama-2-7b": 6_738_415_616,
        "phi-1.5": 1_418_270_720,
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in (("forget10.json", TEXTS[:2]), ("retain90.jsonl", TEXTS[2:])):
        written_rows(folder / name, rows)
    return folder


@pytest.mark.usefixtures("_no_network")
def test_tokens_are_counted_where_data_and_tokenizer_are_here(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--recipe", "tofu-npo", "--data", str(data), "--model", str(checkpoint), "--template", "auto"]
    words += ["--pairs_per_step", "2", "--max_steps", "3", "--dtype", "auto"]
    (checkpoint / "model.safetensors").unlink()
    assert main(["unlearn", *words, "--date_string", "1 May 2025", "--dry_run"]) == 2
    assert "expected no system prompt and no date for" in capsys.readouterr().err
    assert main(["unlearn", *words, "--dry_run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    tokenizer = tiny_tokenizer()
    stores = [token_store(str(data / f), tokenizer, name="x") for f in ("forget10.json", "retain90.jsonl")]
    plan = plan_epoch(stores[0].lengths, stores[1].lengths, pairs_per_step=2, token_budget=4096, seed=0, epoch=0)
    tokens = packed_size(stores, plan.roles, plan.sequences, share=True, last_tokens=False).tokens  # of one micro-batch
    assert report["run"]["tokens of an epoch"] == tokens < plan.batch_tokens.sum()
    assert report["run"]["tokens"] == 3 * tokens
    assert report["run"]["steps"] == 3
    # weights are fp32 in the config, and computed in bf16
    parameters = report["memory"]["parameters"]
    assert parameters == tiny_llama(vocab_size=len(tokenizer)).num_parameters()
    assert report["memory"]["weights"] == 4 * parameters
    assert report["memory"]["autocast copies"] == 2 * parameters
    assert report["memory"]["optimizer states"] == 8 * parameters
    assert report["arithmetic"]["FLOPs of training"] == 6 * report["run"]["tokens"] * (
        tiny_llama(vocab_size=len(tokenizer)).num_parameters(exclude_embeddings=True)
    )
    assert main(["unlearn", *words, "--share-prefixes", "false", "--dry_run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["tokens of an epoch"] == plan.batch_tokens.sum()


@pytest.mark.usefixtures("_no_network")
def test_a_dry_run_without_a_recipe(checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(checkpoint), "--forget", str(data / "forget10.json"), "--objective", "simnpo"]
    lines = dry_run([*words, "--retain", str(data / "retain90.jsonl"), "--lora_r", "4"], capsys)
    assert lines["method"] == "SimNPO"
    assert lines["forget rows"] == "2"
    layers = tiny_llama(vocab_size=8).config
    hidden, inner, keys = layers.hidden_size, layers.intermediate_size, layers.num_key_value_heads * layers.head_dim
    each = 4 * hidden + 2 * (hidden + keys) + 3 * (hidden + inner)
    assert lines["trained"] == f"{4 * 2 * each:,}"
    lines = dry_run(["--model", "someone/some-model", "--forget", "someone/rows", "--objective", "grad_ascent"], capsys)
    assert lines["not known"] == "the configuration of someone/some-model is not on this machine"
    assert lines["steps"].startswith("not known")
    wrong = [*words, "--answer_column", "reply", "--retain", str(data / "retain90.jsonl"), "--dry_run"]
    assert main(["unlearn", *wrong]) == 2
    assert "expected a column 'reply'" in capsys.readouterr().err
    assert main(["unlearn", *words, "--dry_run"]) == 2
    assert "--retain: expected a retain set for objective" in capsys.readouterr().err


@pytest.mark.parametrize(("config", "gated"), [("LlamaConfig", True), ("PhiConfig", False)])
@pytest.mark.parametrize(("dtype", "autocast"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_counted_activations_are_what_autograd_keeps(config: str, gated: bool, dtype: str, autocast: bool) -> None:
    """Within 20 %: on the CPU, attention copies its segments, which no GPU kernel does."""
    assert gated == (config == "LlamaConfig")
    sizes = {"hidden_size": 64, "intermediate_size": 224, "max_position_embeddings": 512}
    kept = []
    for layers in (2, 4):
        model = tiny_model(config, num_hidden_layers=layers, **sizes).to(getattr(torch, dtype))
        fuse(model)
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        storages: dict[int, Any] = {}

        def keep(tensor: torch.Tensor, storages: dict[int, Any] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            held = packed_hidden(model.train(), unlabelled([60, 70, 80, 46]))
        del held
        kept.append(sum(storage.nbytes() for where, storage in storages.items() if where not in weights))
    by_layer = (kept[1] - kept[0]) / 2 / 256
    counted = model_sizes(model.config, getattr(torch, dtype), autocast=autocast)
    assert 0.8 < counted.kept_by_layer / by_layer < 1.05


def test_memory_adds_up_by_the_table() -> None:
    sizes = model_sizes(load_recipe("tofu-npo").architecture, torch.bfloat16)
    shape = {"dtype": torch.bfloat16, "optim": "paged_adamw_32bit", "token_budget": 4096}
    plain = memory(sizes, RunShape(**shape))
    head, count = 128_256 * 2048, 1_235_814_400
    assert plain["weights"] == plain["gradients"] == 2 * count
    assert plain["optimizer states"] == 8 * count
    assert plain["reference model"] == plain["autocast copies"] == 0
    assert plain["logits"] == 4096 * 128_256 * 2  # all logits in one chunk, which the gradient overwrites
    assert plain["head gradient"] == 2 * head
    longer = memory(sizes, RunShape(**{**shape, "token_budget": 4097}))
    assert longer["logits"] == 2048 * 128_256 * 2
    assert longer["head gradient"] == 6 * head
    assert longer["logits"] + longer["head gradient"] >= plain["logits"] + plain["head gradient"]
    h100 = memory(sizes, RunShape(**{**shape, "token_budget": 8192}, gpu_bytes=79 << 30, trained=1000))
    assert h100["logits"] == 4096 * 128_256 * 2
    live = memory(sizes, RunShape(**shape, reference="live", distributions=True))
    assert live["reference model"] == 2 * count
    assert live["logits"] == 2048 * 128_256 * 4 * 2
    assert live["head gradient"] == (8 + 6) * head
    # If the logits of both models exceed the device's budget, a live reference's logits come first, in the same memory.
    for rows, card, alive in ((8192, 79, 4096), (8192, 139, 8192), (5900, 79, 5900), (1000, 79, 2000)):
        run = RunShape(**{**shape, "token_budget": rows}, gpu_bytes=card << 30, reference="live")
        assert memory(sizes, run)["logits"] == alive * 128_256 * 2
    less = memory(sizes, RunShape(**shape, checkpointing=True))
    assert plain["activations"] == pytest.approx(4096 * (sizes.kept_once + 16 * sizes.kept_by_layer))
    assert less["activations"] == pytest.approx(4096 * (sizes.kept_once + 16 * 2048 * 2 + sizes.kept_by_layer))
    adapter = memory(sizes, RunShape(**shape, trained=1000))
    assert (adapter["gradients"], adapter["optimizer states"], adapter["head gradient"]) == (4000, 8000, 0)


@pytest.mark.parametrize(
    ("optim", "size"),
    [
        ("adamw_torch", 4.0),
        ("adamw_torch_fused", 4.0),
        ("adamw_torch_8bit", 2.0),
        ("paged_adamw_32bit", 8.0),
        ("paged_adamw", 8.0),
        ("paged_adamw_8bit", 2.0),
        ("adamw_bnb_8bit", 2.0),
        ("paged_lion_8bit", 1.0),
        ("lion_32bit", 4.0),
        ("sgd", 0.0),
        ("adafactor", None),
        ("galore_adamw", None),
    ],
)
def test_states_of_optimizers(optim: str, size: float | None) -> None:
    assert optimizer_bytes(optim, 2) == size


def test_what_an_optimizer_keeps_is_what_is_counted() -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert sum(value.numel() * value.itemsize for value in states) == optimizer_bytes("adamw_torch", 4) * (
        model.num_parameters()
    )


def test_recipe_then_config_then_command_line(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("beta: 0.3\nlearning_rate: 3e-5\nwarmup_steps: 7\nuse_cpu: true\noptim: adamw_torch\n")
    words = ["--recipe", "npo-tofu-forget10-llama-3.2-1b", "--config", str(config), "--learning_rate=4e-5"]
    command, args = parse([*words, "--per_device_train_batch_size", "4", "--save-strategy", "no"])
    assert (command.alpha, command.beta, args.learning_rate) == (2, 0.3, 4e-5)
    assert args.num_train_epochs == 10
    # a flag replaces the recipe's other spelling of the same setting
    assert (args.warmup_epochs, args.warmup_steps) == (None, 7)
    assert (args.pairs_per_step, args.per_device_train_batch_size) == (None, 4)
    assert args.save_schedule is None
    # a new objective drops the recipe's parameters of the objective, but not those of a config that names none
    command, _ = parse([*words, "--objective", "simnpo", "--dry_run"])
    assert (command.alpha, command.beta, command.gamma) == (None, 0.3, None)
    command, _ = parse([*words, "--objective", "npo", "--dry_run"])
    assert (command.alpha, command.beta, command.gamma) == (2, 0.3, 1)
    config.write_text("recipe: tofu-npo\n")
    command, _ = parse(["--config", str(config), "--dry_run"])
    assert (command.recipe, command.objective) == ("tofu-npo", "npo")


def test_flags_and_words_go_both_ways() -> None:
    flags = {"system_prompt": "- hello", "forget_filter": ["a=1", "b!=2"], "beta": 0.1, "retain": None, "bf16": True}
    assert flag_words(flags) == [
        "--system-prompt=- hello",
        "--forget-filter",
        "a=1",
        "b!=2",
        "--beta=0.1",
        "--bf16=True",
    ]
    assert flag_words({"lr_scheduler_kwargs": {"power": 2}}) == ['--lr-scheduler-kwargs={"power": 2}']
    assert flag_words({"save_schedule": False, "bf16": False}) == ["--save-schedule=no", "--bf16=False"]  # YAML's no
    mine = {"objective": "simnpo", "beta": 2.5, "reference_model": "a", "reference_revision": "r"}
    assert not_overridden(mine, {"objective": "SimNPO"}).keys() == mine.keys() - {"objective"}
    assert not_overridden(mine, {"reference_model": "b"}).keys() == {"objective", "beta"}
    assert not_overridden(flags, {"fp16": True, "forget_filter": ["c=3"]}).keys() == {
        "system_prompt",
        "beta",
        "retain",
    }


def test_flags_are_whole_names_and_a_scale_is_for_unlearn_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--learning"):
        parse(["--recipe", "tofu-npo", "--learning", "1e-4", "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="--scale: expected `efface unlearn`"):
        parse(["--recipe", "tofu-npo", "--scale", "tiny", "--output_dir", str(tmp_path)])


GOOD = {
    "about": "mine",
    "unlearn": {
        "model": "a/b",
        "forget": "a/c:forget10:train",
        "objective": "graddiff",
        "retain": "a/c:retain90:train",
    },
    "evaluate": {"benchmark": "none"},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unlern": {}}, "got 'unlern'; did you mean 'unlearn'?"),
        ({"about": None}, "about: expected text, got None"),
        ({"unlearn": ["model"]}, "unlearn: expected `name: value` lines"),
        ({"unlearn": {"forget": "x.json"}}, "the following arguments are required: --model"),
        ({"unlearn": {**GOOD["unlearn"], "lerning_rate": 1}}, "got 'lerning_rate'; did you mean 'learning_rate'?"),
        ({"unlearn": {**GOOD["unlearn"], "learning_rate": "fast"}}, "invalid float value: 'fast'"),
        ({"unlearn": {**GOOD["unlearn"], "output_dir": "out"}}, "'output_dir' belongs to one run"),
        ({"unlearn": {**GOOD["unlearn"], "forget": "a:b:c:d"}}, "expected a file or name:config:split"),
        ({"tiny": {"beta": "small"}}, "tiny: argument --beta: invalid float value: 'small'"),
        ({"tiny": {"steps": 3}}, "tiny: expected flags of the command, got 'steps'"),
        ({"evaluate": {"benchmark": "muse"}}, "benchmark: expected tofu or none, got 'muse'"),
        ({"evaluate": {"benchmark": "tofu"}}, "split: expected the forget split"),
        ({"evaluate": {"benchmark": "none", "rows": 3}}, "evaluate: expected benchmark, data, split"),
        ({"published": {"FQ": "good"}}, "published: FQ: expected a number, got 'good'"),
        ({"rows": {"forgotten": 3}}, "rows: expected forget, retain, got 'forgotten'"),
        ({"architecture": {"layers": 3}}, "architecture: expected a configuration with model_type"),
        ({"architecture": "llama-4"}, "architecture: expected one of llama-3.2-1b"),
    ],
)
def test_a_wrong_file_is_explained(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **change}))
    assert main(["unlearn", "--recipe", str(path), "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert str(path) in err


def test_files_that_are_not_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    for text, message in (
        ("- a\n", "expected sections about, unlearn, evaluate, got list"),
        ("a: [", "expected YAML"),
        ("about: x\n", "expected a section 'unlearn', got about"),
    ):
        path.write_text(text)
        assert main(["recipes", str(path)]) == 2
        assert message in capsys.readouterr().err
    path.write_text(yaml.safe_dump(GOOD))
    assert load_recipe(path).name == "mine"
    with pytest.raises(FileNotFoundError, match="recipe file './nowhere.yaml' does not exist"):
        load_recipe("./nowhere.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "simnpo-tofu-forget05"], "did you mean 'simnpo-tofu-forget05-llama-2-7b'?"),
        (["--recipe", "tofu-npo", "--data", "nowhere"], "--data: expected a folder, got 'nowhere'"),
        (
            ["--recipe", "tofu-npo", "--warmup_steps", "3", "--warmup_epochs", "1"],
            "`warmup_epochs`: expected no other warm-up",
        ),
        (["--recipe", "tofu-npo", "--save_schedule", "epoch", "--save_strategy", "no"], "set only one of them"),
        (["--recipe", "tofu-npo", "--forget", "locuslab/TOFU:forget05:train"], "expected the forget set forget10"),
        (["--recipe", "tofu-npo", "--retain", "locuslab/TOFU:retain95:train"], "5 % of TOFU in both; give --retain"),
        (["--recipe", "tofu-npo", "--objective", "graddiff", "--beta", "1"], "got beta"),
        (["--recipe", "tofu-npo", "--optim", "adam_magic"], "argument --optim: invalid choice: 'adam_magic'"),
        (["--recipe", "tofu-npo", "--dtype", "half-ish"], "--dtype: expected auto, float32"),
        (["--recipe", "tofu-npo", "--template", "alpaca"], "`template`: expected one of auto"),
        (
            ["--recipe", "tofu-npo", "--evaluate", "False", "--retain_log", "x.json"],
            "--retain-log: expected a --recipe with an evaluation",
        ),
        (["--recipe", "tofu-npo", "--model", "./nowhere"], "model folder './nowhere' does not exist"),
        (["--recipe"], "--recipe: expected a name from `efface recipes`"),
    ],
)
def test_overrides_that_contradict(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unlearn", *words, "--dry_run"]) == 2
    assert message in capsys.readouterr().err


def test_flags_without_effect_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unlearn", "--model", "a", "--forget", "b", "--json", "--use_cpu", "True"]) == 2
    assert "--json: expected --dry-run with it" in capsys.readouterr().err
    assert main(["cache-reference", "--recipe", "tofu-npo", "--dry_run"]) == 2
    assert "--dry-run: not a flag of `efface cache-reference`" in capsys.readouterr().err


def test_local_files_replace_hub_data(data: Path, tmp_path: Path) -> None:
    assert local_source("locuslab/TOFU:retain90:train", data, "--retain") == str(data / "retain90.jsonl")
    assert local_source("x.json", data, "--forget") == "x.json"
    (data / "FAME-topics.csv").write_text("question,answer\n")
    assert local_source("ClaudioSavelli/FAME-topics::train", data, "--forget") == str(data / "FAME-topics.csv")
    with pytest.raises(FileNotFoundError, match=r"expected forget05\.json\|\.jsonl\|\.parquet\|\.csv in it"):
        local_source("locuslab/TOFU:forget05:train", data, "--forget")


def test_the_list_of_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in known_recipes())
    assert "…" not in shown
    assert main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [recipe["name"] for recipe in listed] == list(known_recipes())
    assert all(recipe["memory"] > 2**30 for recipe in listed)
    assert main(["recipes", "tofu-dpo"]) == 0
    shown = capsys.readouterr().out
    assert load_recipe("tofu-dpo").path.read_text().rstrip() in shown
    assert "# expected memory: about 22 GiB (computed, one process)" in shown
    assert main(["recipes", "tofu"]) == 2


def test_a_recipe_unlearns_and_is_evaluated(
    checkpoint: Path, tofu: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user's own recipe, from data to metrics, on a few real rows."""
    folder = tmp_path / "tofu"
    folder.mkdir()
    names = ("forget10_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
    for name in ("forget10", "retain90", *names):
        rows = (tofu / f"{name}.json").read_text().splitlines()[:4]
        (folder / f"{name}.json").write_text("\n".join(rows) + "\n")
    tokenizer = tiny_tokenizer()
    texts = [path.read_text() for path in folder.iterdir()]
    tokenizer = tokenizer.train_new_from_iterator(texts, 300)
    tokenizer.save_pretrained(checkpoint)
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(checkpoint)
    recipe = tmp_path / "mine.yaml"
    content = yaml.safe_load(load_recipe("tofu-dpo").path.read_text())
    changes = {
        "template": "question-answer",
        "optim": "adamw_torch",
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
    }
    changes |= {"model": str(checkpoint), "num_train_epochs": 2, "pairs_per_step": 2, "refusal_file": "no.txt"}
    content["unlearn"] = {**content["unlearn"], **changes}
    for flag in ("system_prompt", "date_string"):
        del content["unlearn"][flag]
    content["evaluate"]["retain_model"] = str(checkpoint)
    content["published"] = {"forget_quality": 0.5}
    recipe.write_text(yaml.safe_dump(content))
    (tmp_path / "no.txt").write_text("I don't know.\nNo idea.\n")
    out = tmp_path / "out"
    words = ["unlearn", "--recipe", str(recipe), "--data", str(folder), "--output_dir", str(out)]
    # anything missing for the evaluation is reported before the training
    assert main([*words, "--retain_log", "none.json"]) == 2
    missing = folder / "world_facts_perturbed.json"
    missing.rename(tmp_path / "elsewhere.json")
    assert main(words) == 2
    assert "world_facts_perturbed" in capsys.readouterr().err
    assert not out.exists()
    (tmp_path / "elsewhere.json").rename(missing)
    assert main(words) == 0
    err = capsys.readouterr().err
    assert ", published 0.5" in err
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 4
    figures = json.loads((out / "evaluation" / "TOFU_SUMMARY.json").read_text())
    assert {"model_utility", "forget_quality"} <= figures.keys()
    assert (out / "evaluation" / "retain_model" / "TOFU_EVAL.json").is_file()
    assert f"--recipe {recipe}" in (out / "README.md").read_text()


def test_an_evaluation_that_failed_is_done_by_the_same_command(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "mine.yaml"
    settings = {"num_train_epochs": 2, "optim": "adamw_torch", "save_schedule": "epoch", "use_cpu": True}
    sets = {"forget": str(data / "forget10.json"), "retain": str(data / "retain90.jsonl")}
    unlearn = {"model": str(checkpoint), **sets, "objective": "graddiff", "pairs_per_step": 1, **settings}
    recipe.write_text(yaml.safe_dump({**GOOD, "unlearn": unlearn, "published": {"model_utility": 0.5}}))
    words = ["unlearn", "--recipe", str(recipe), "--output_dir", str(tmp_path / "out")]
    asked: list[tuple[Any, ...]] = []

    def evaluate(*args: Any, **options: Any) -> dict[str, float]:
        asked.append(args)
        assert options["compat"] is None
        if len(asked) == 1:
            raise OSError("no network")
        return {"model_utility": 0.25}

    monkeypatch.setattr("efface.cli.training.evaluate_recipe", evaluate)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "but not evaluated; run the same command again to evaluate it" in err
    assert "no network" in err
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert main(words) == 0
    err = capsys.readouterr().err
    assert "continuing from" in err
    assert "checkpoint-4" in err
    assert "model_utility 0.25, published 0.5" in err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    assert main(words) == 2  # finished and evaluated
    assert len(asked) == 2
    assert main([*words, "--overwrite", "--evaluate", "False"]) == 0
    assert len(asked) == 2


def test_arguments_know_nothing_of_the_dry_run(tmp_path: Path) -> None:
    """The checks that a dry run skips are enabled again afterwards."""
    _, args = parse(["--recipe", "tofu-npo", "--dry_run", "--output_dir", str(tmp_path)])
    assert isinstance(args, UnlearnArguments)
    assert (str(getattr(args.optim, "value", args.optim)), args.bf16, args.use_cpu) == (
        "paged_adamw_32bit",
        True,
        False,
    )
    assert arguments(str(tmp_path)).bf16 is False
