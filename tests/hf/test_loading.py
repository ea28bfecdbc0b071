"""Tests of loading models by name and revision: folders, the Hub's cache, repositories with an empty main branch."""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from efface import GradAscent, UnlearnTrainer
from efface.cli.main import COMMANDS, main
from efface.hf.model import loading
from efface.hf.model.loading import load_model, load_tokenizer, local_revision
from support.helpers import (
    LONG,
    TEXTS,
    TINY,
    arguments,
    random_store,
    saved_llama,
    tiny_decoder,
    tiny_llama,
    tiny_model,
    tiny_tokenizer,
    written_rows,
)


def saved(folder: Path, seed: int) -> torch.Tensor:
    model = tiny_llama(seed=seed, vocab_size=300)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model.lm_head.weight.detach()


def test_a_checkpoint_of_a_folder_is_a_revision(tmp_path: Path) -> None:
    last, twelfth = saved(tmp_path, 0), saved(tmp_path / "checkpoint-12", 1)
    assert torch.equal(load_model(str(tmp_path)).lm_head.weight, last)
    assert torch.equal(load_model(str(tmp_path), revision="checkpoint-12").lm_head.weight, twelfth)
    assert load_model(str(tmp_path), revision="checkpoint-12", dtype="bfloat16").dtype == torch.bfloat16
    assert len(load_tokenizer(str(tmp_path), revision="checkpoint-12")) > 0
    with pytest.raises(
        FileNotFoundError, match="expected weights at revision 'checkpoint-13'.*its revisions are checkpoint-12"
    ):
        load_model(str(tmp_path), revision="checkpoint-13")


def test_a_folder_with_checkpoints_alone_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (2, 12):
        saved(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "run.json").write_text("{}")
    rows = written_rows(tmp_path / "rows.json")
    words = ["unlearn", "--model", str(tmp_path), "--forget", str(rows), "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--use_cpu", "True"]) == 2
    told = capsys.readouterr().err
    assert "its revisions are checkpoint-2, checkpoint-12; choose one, such as `--revision checkpoint-12`" in told


def test_the_layout_of_the_hub_cache(tmp_path: Path) -> None:
    weights = saved(tmp_path / "snapshots" / "abc", 3)
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "checkpoint-12").write_text("abc")
    assert torch.equal(load_model(str(tmp_path), revision="checkpoint-12").lm_head.weight, weights)
    with pytest.raises(FileNotFoundError, match="at revision 'main', got none; its revisions are checkpoint-12"):
        local_revision(tmp_path, "main")


class FakeFiles:
    def __init__(self, branches: dict[str, list[str]]) -> None:
        self.branches = branches

    def list_repo_refs(self, repo_id: str) -> Any:
        return SimpleNamespace(branches=[SimpleNamespace(name=name) for name in self.branches])

    def list_repo_files(self, repo_id: str, *, revision: str) -> list[str]:
        return self.branches[revision]


class Unreachable(FakeFiles):
    def list_repo_refs(self, repo_id: str) -> Any:
        raise ConnectionError("no network")


WEIGHTS = ["config.json", "model.safetensors"]


def test_a_hub_repository_with_weights_in_its_revisions_only() -> None:
    """As the Phi-1.5 models of TOFU. Offline, the real library fails as it does for missing files."""
    phi = FakeFiles({"main": ["README.md", ".gitattributes"], "checkpoint-6": WEIGHTS, "checkpoint-12": WEIGHTS})
    message = (
        "model 'me/phi': expected weights at revision 'main', got none; its revisions are checkpoint-6, checkpoint-12; "
        "choose one, such as `--revision checkpoint-12`"
    )
    for load in (load_model, load_tokenizer):
        with pytest.raises(FileNotFoundError, match=message):
            load("me/phi", client=phi)
    with pytest.raises(
        FileNotFoundError, match="weights at revision 'checkpoint-7', got none; its revisions are main, check"
    ):
        load_model("me/phi", revision="checkpoint-7", client=phi)


@pytest.mark.parametrize(
    "client", [FakeFiles({"main": WEIGHTS, "dev": WEIGHTS}), FakeFiles({"main": ["README.md"]}), Unreachable({})]
)
def test_other_errors_keep_their_messages(client: FakeFiles) -> None:
    with pytest.raises(OSError, match="connect") as caught:
        load_model("me/phi", client=client)
    assert "weights at revision" not in str(caught.value)


def test_the_revision_reaches_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def from_pretrained(name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
        asked.update(options, name=name)
        return tiny_llama(), {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    assert isinstance(loading.load_model("me/phi", revision="checkpoint-12"), transformers.LlamaForCausalLM)
    assert (asked["name"], asked["revision"], asked["dtype"]) == ("me/phi", "checkpoint-12", "auto")


def test_a_missing_path_is_not_looked_up_on_the_hub() -> None:
    with pytest.raises(FileNotFoundError, match=r"model folder './nowhere' does not exist"):
        load_model("./nowhere")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_eight_bits_need_their_package(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ImportError, match=r"an 8-bit model needs the package bitsandbytes.*pip install"):
        load_model(str(tmp_path), load_in_8bit=True)


# ---- checkpoints that do not match their config ----


def with_config(**changes: Any) -> Callable[[Path], None]:
    """Return a function that changes entries of a folder's config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def with_weights(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    """Return a function that changes a folder's weights."""

    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return rewrite


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a layer too many": (
        with_config(num_hidden_layers=3, layer_types=None),
        r"9 tensors not in the checkpoint, so random \(model.layers.2.input_layernorm.weight, ...\)",
    ),
    "a layer too few": (
        with_config(num_hidden_layers=1, layer_types=None),
        r"9 tensors in the checkpoint, but not in the model \(model.layers.1.input_layernorm.weight, ...\)",
    ),
    "another shape": (
        with_config(intermediate_size=40),
        r"6 tensors of another shape \(model.layers.0.mlp.down_proj.weight( \(32, 48\) instead of \(32, 40\))?, ...\)",
    ),
    "another vocabulary": (with_config(vocab_size=90), "of another shape"),
    "a weight missing": (
        with_weights(lambda held: {name: held[name] for name in held if name != "model.norm.weight"}),
        r"1 tensor not in the checkpoint, so random \(model.norm.weight\)",
    ),
    "a weight too many": (
        with_weights(lambda held: {**held, "model.layers.0.self_attn.q_proj.extra": torch.ones(2)}),
        r"1 tensor in the checkpoint, but not in the model \(model.layers.0.self_attn.q_proj.extra\)",
    ),
    "no head of its own": (with_config(tie_word_embeddings=False), r"not in the checkpoint, so random \(lm_head"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an intact model, rows, and a broken model for each fault."""
    folder = tmp_path_factory.mktemp("claims")
    saved_llama(folder / "whole")
    written_rows(folder / "rows.json")
    for name, (break_it, _) in FAULTS.items():
        saved_llama(folder / name)
        break_it(folder / name)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_does_not_match_its_config_is_refused(fault: str, files: Path) -> None:
    with pytest.raises(ValueError, match=rf"^model '.*{fault}': expected the weights of a .*{FAULTS[fault][1]}"):
        load_model(str(files / fault))


SOUND: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "untied": ("LlamaConfig", {"tie_word_embeddings": False}),
    "GPT-2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "GPT-NeoX": ("GPTNeoXConfig", {}),
    "Phi": ("PhiConfig", {}),
    "Gemma 2": ("Gemma2Config", {"head_dim": 8}),
    "Qwen 3": ("Qwen3Config", {"head_dim": 8}),
    "Mixtral": ("MixtralConfig", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "OPT": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Bloom": ("BloomConfig", {}),
}


@pytest.mark.parametrize("family", SOUND)
def test_a_whole_checkpoint_is_taken(family: str, tmp_path: Path) -> None:
    config, settings = SOUND[family]
    model = tiny_model(config, **settings)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


@LONG
@pytest.mark.filterwarnings("ignore")
def test_checkpoints_of_all_families_are_accepted(tmp_path: Path) -> None:
    """For all families of which a common set of small sizes makes a model."""
    sizes = {**TINY, "head_dim": 8, "num_experts": 2, "num_local_experts": 2, "moe_intermediate_size": 16}
    sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "d_model": 32, "ffn_dim": 48, "state_size": 4}
    taken = 0
    for i, family in enumerate(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        folder = tmp_path / str(i)
        try:
            config = transformers.AutoConfig.for_model(family, **sizes)
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config)
            if sum(weight.numel() for weight in model.parameters()) > 10**7:
                continue
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        except Exception:  # noqa: BLE001 - a family that needs other sizes, or a missing package
            continue
        load_model(str(folder))
        shutil.rmtree(folder)
        taken += 1
    assert taken > 50


def test_tensors_that_transformers_ignores_are_accepted(tmp_path: Path) -> None:
    """Buffers in checkpoints of old versions, and a tied head that was saved as well."""
    saved_llama(tmp_path)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    with_weights(lambda held: {**held, **old, "lm_head.weight": held["model.embed_tokens.weight"].clone()})(tmp_path)
    load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("gpt_neo", ["attn.attention.bias", "attn.attention.masked_bias"]),
        ("gptj", ["attn.bias", "attn.masked_bias"]),
        ("gpt2", ["attn.bias", "attn.masked_bias"]),
    ],
)
def test_the_masks_of_old_checkpoints_are_accepted(kind: str, names: list[str], tmp_path: Path) -> None:
    tiny_decoder(kind).save_pretrained(tmp_path)
    masks = {f"transformer.h.0.{name}": torch.ones(1, 1, 4, 4) for name in names}
    with_weights(lambda held: {**held, **masks})(tmp_path)
    load_model(str(tmp_path))
    with_weights(lambda held: {**held, "transformer.h.0.mlp.c_more.bias": torch.ones(4)})(tmp_path)
    with pytest.raises(ValueError, match="in the checkpoint, but not in the model"):
        load_model(str(tmp_path))


def test_truncated_weights_are_reported(tmp_path: Path) -> None:
    saved_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="its weights cannot be read .* get the files again"):
        load_model(str(tmp_path))


_RUN = ["--forget", "ROWS", "--alpha", "0", "--use_cpu", "True", "--output_dir", "OUT"]
_RIVAL = ["--forget", "ROWS", "--holdout", "ROWS", "--metrics", "mia_reference", "--output", "OUT"]
# The words with which each command names a model; None for commands that read no model.
LOADS: dict[str, list[list[str]] | None] = {
    "unlearn": [
        [*_RUN, "--model", "BROKEN"],
        [*_RUN, "--model", "BROKEN", "--lora_r", "2"],
        [*_RUN, "--model", "WHOLE", "--reference_model", "BROKEN"],
        [*_RUN, "--model", "ADAPTER"],
    ],
    "finetune": [["--model", "BROKEN", "--data", "ROWS", "--use_cpu", "True", "--output_dir", "OUT"]],
    "cache-reference": [["--model", "BROKEN", "--forget", "ROWS", "--use_cpu", "True", "--reference_cache", "OUT"]],
    "evaluate": [
        ["--model", "BROKEN", "--forget", "ROWS", "--metrics", "probability", "--output", "OUT"],
        [*_RIVAL, "--model", "WHOLE", "--reference-model", "BROKEN"],
        ["--model", "BROKEN", "--output", "OUT"],
    ],
    "audit": [
        ["--model", "BROKEN", "--data", "ROWS", "--views", "direct", "--output", "OUT"],
        ["--model", "ADAPTER", "--data", "ROWS", "--views", "direct", "--output", "OUT"],
    ],
    "sweep": None,  # starts `unlearn`, `evaluate` and `cache-reference`
    "demo": None,  # trains its own
    **dict.fromkeys(("bench", "cache", "completion", "plan", "recipes", "report")),
}


def test_every_command_is_known() -> None:
    """A new command must be added to LOADS."""
    assert set(LOADS) >= set(COMMANDS)


@pytest.mark.parametrize(
    "fault", ["a layer too many", *(pytest.param(name, marks=LONG) for name in ("a layer too few", "another shape"))]
)
@pytest.mark.parametrize(
    ("command", "words"), [(command, words) for command, uses in LOADS.items() for words in uses or ()]
)
def test_every_command_that_reads_a_model_refuses_it(
    command: str, words: list[str], fault: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {
        "BROKEN": files / fault,
        "WHOLE": files / "whole",
        "ROWS": files / "rows.json",
        "OUT": tmp_path / "out",
        "ADAPTER": tmp_path / "adapter",
    }
    if "ADAPTER" in words:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
        peft.get_peft_model(load_model(str(files / "whole")), config).save_pretrained(tmp_path / "adapter")
        with_base = tmp_path / "adapter" / "adapter_config.json"
        with_base.write_text(with_base.read_text().replace(str(files / "whole"), str(files / fault)))
        tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    assert main([command, *(str(places.get(word, word)) for word in words)]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"efface {command}: error: model '{files / fault}': expected the weights of a" in told
    assert not list((tmp_path / "out").rglob("*.safetensors"))


# ---- saved adapters ----


def saved_adapter(folder: Path, base: Path, **settings: Any) -> Path:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"], **settings})
    peft.get_peft_model(load_model(str(base)), config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("layers", "intermediate", "message"),
    [
        (3, 48, "the adapter lacks"),
        (1, 48, "the model lacks"),
        (2, 40, "size mismatch"),
    ],
)
def test_an_adapter_of_another_base_is_refused(layers: int, intermediate: int, message: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    saved_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["q_proj", "down_proj"])
    tiny_llama(num_hidden_layers=layers, intermediate_size=intermediate).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=rf"^adapter .* does not fit its base model '.*/base': .*{message}"):
        load_model(str(tmp_path / "adapter"))


def test_problems_with_an_adapters_base_are_reported(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    folder = saved_adapter(tmp_path / "adapter", tmp_path / "base")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())

    def base_is(name: str | None) -> None:
        path.write_text(json.dumps({**config, "base_model_name_or_path": name}))

    base_is("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"adapter .* its base model cannot be loaded: .*'./nowhere'"):
        load_model(str(folder))
    base_is(None)
    with pytest.raises(ValueError, match="expected base_model_name_or_path in adapter_config.json, got none"):
        load_model(str(folder))
    saved_adapter(tmp_path / "inner", tmp_path / "base")
    base_is(str(tmp_path / "inner"))
    with pytest.raises(
        ValueError, match=r"expected a whole model as its base, got '.*inner', which is also an adapter"
    ):
        load_model(str(folder))
    tiny_llama().save_pretrained(folder)
    with pytest.raises(ValueError, match="got both config.json and adapter_config.json"):
        load_model(str(folder))


def test_the_base_of_an_adapter_is_of_its_revision(tmp_path: Path) -> None:
    for seed, folder in enumerate((tmp_path / "base", tmp_path / "base" / "checkpoint-12")):
        tiny_llama(seed=seed).save_pretrained(folder)
    expected = load_model(str(tmp_path / "base"), revision="checkpoint-12").lm_head.weight
    folder = saved_adapter(tmp_path / "adapter", tmp_path / "base", revision="checkpoint-12")
    assert torch.equal(load_model(str(folder)).get_base_model().lm_head.weight, expected)


GROWN: dict[str, tuple[bool, dict[str, Any], str | None]] = {  # tied, settings of the adapter, message if rejected
    "both in modules_to_save": (False, {"modules_to_save": ["embed_tokens", "lm_head"]}, None),
    "both saved by peft itself": (False, {}, None),
    "both saved by peft itself, tied": (True, {}, None),
    "both adapted": (False, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, None),
    "the embeddings alone": (False, {"modules_to_save": ["embed_tokens"]}, "it lacks the head"),
    "the head alone": (False, {"modules_to_save": ["lm_head"]}, "it lacks the input embeddings"),
    "the embeddings alone, tied": (True, {"modules_to_save": ["embed_tokens"]}, "it lacks the head"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", GROWN)
def test_an_adapter_with_added_tokens_is_read_back_bit_for_bit_or_refused(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tied, settings, refusal = GROWN[case]
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = load_model(str(tmp_path / "base"))
    model.resize_token_embeddings(TINY["vocab_size"] + 3)
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"], **settings})
    model = peft.get_peft_model(model, config).eval()
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    saving = {"save_embedding_layers": False} if refusal else {}
    model.save_pretrained(tmp_path / "adapter", **saving)
    ids = torch.tensor([[3, 97, 5, 98]])
    if refusal is not None:
        with pytest.raises(
            ValueError, match=rf"vocabulary of 99 tokens, its base model '.*base' one of 96, .*{refusal}"
        ):
            load_model(str(tmp_path / "adapter"))
        return
    state = torch.get_rng_state()
    loaded = load_model(str(tmp_path / "adapter"))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    torch.set_rng_state(state)


# ---- runs that would not change the model ----

NOTHING: dict[str, tuple[dict[str, Any], str]] = {
    "no epochs": ({"num_train_epochs": 0}, "`num_train_epochs`: expected more than 0, got 0"),
    "less than no epochs": ({"num_train_epochs": -1}, "`num_train_epochs`: expected more than 0, got -1"),
    "no steps": ({"max_steps": 0}, "`max_steps`: expected at least 1 optimizer step, or -1"),
    "less than no steps": ({"max_steps": -2}, "`max_steps`: expected at least 1 optimizer step, or -1"),
    "no step in an epoch": (
        {"pairs_per_step": 64, "dataloader_drop_last": True},
        "expected at least one full step of 64 pairs, got an epoch of 5",
    ),
    "no learning rate": ({"learning_rate": 0}, "expected (more than 0|a learning rate above 0)"),
    "a warm-up longer than the run": (
        {"max_steps": 1, "warmup_steps": 5},
        "expected a learning rate above 0, got 0 at each of the 1 steps",
    ),
}


@pytest.mark.parametrize("command", ["unlearn", pytest.param("finetune", marks=LONG)])
@pytest.mark.parametrize("case", NOTHING)
def test_a_run_that_trains_nothing_is_refused(
    case: str, command: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, message = NOTHING[case]
    data = ["--data" if command == "finetune" else "--forget", str(files / "rows.json")]
    data += ["--warmup_epochs", "0"] if command == "finetune" and "warmup_steps" not in settings else []
    if command == "finetune" and "warmup_steps" in settings:
        settings = {"max_steps": 1}  # its own warm-up is an epoch
    words = [
        command,
        "--model",
        str(files / "whole"),
        *data,
        "--use_cpu",
        "True",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    words += ["--alpha", "0", "--objective", "grad_ascent"] if command == "unlearn" else []
    assert main([*words, *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]) == 2
    told = capsys.readouterr().err
    assert re.search(message, told), told
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert not list((tmp_path / "out").rglob("README.md"))


@pytest.mark.parametrize("case", NOTHING)
def test_a_trainer_that_trains_nothing_is_refused(case: str, tmp_path: Path) -> None:
    settings, message = NOTHING[case]
    with pytest.raises(ValueError, match=message):
        UnlearnTrainer(
            tiny_llama(), arguments(tmp_path, **settings), forget=random_store(5), retain=None, objective=GradAscent()
        ).train()


# ---- custom code, and separate tokenizers ----

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
open("code_ran", "w").close()
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that comes with its own code but without a tokenizer, which is in a separate folder."""
    monkeypatch.chdir(tmp_path)
    folder = saved_llama(tmp_path / "own")
    for file in folder.glob("*token*"):
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        file.rename(tmp_path / "tokenizer" / file.name)
    (folder / "modeling_own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    changes = {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_code_of_a_checkpoint_runs_when_it_is_trusted(own_code: Path) -> None:
    with pytest.raises(ValueError, match=r"got 'own_llama', which needs code from the checkpoint \(modeling_own\.py\)"):
        load_model(str(own_code))
    assert not Path("code_ran").exists()
    model = load_model(str(own_code), trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert Path("code_ran").exists()


TAUGHT = "--model own --use-cpu True --max-steps 2 --warmup-epochs 0 --output-dir out"
WITH_CODE = {
    "unlearn": "--model own --forget rows.json --retain keep.json --use-cpu True --max-steps 1 --output-dir out",
    "unlearn dry": "--model own --forget rows.json --retain keep.json --use-cpu True --output-dir out --dry-run",
    "finetune": f"--data rows.json {TAUGHT}",
    "finetune anew": f"--data rows.json {TAUGHT} --from-config",
    "cache-reference": "--model own --forget rows.json --use-cpu True --output-dir out",
    "evaluate": "--model own --metrics extraction_strength --forget rows.json --output out",
    "audit": "--model own --data rows.json --views direct --max-new-tokens 4 --output out",
}


@pytest.mark.parametrize("name", WITH_CODE)
def test_commands_take_a_tokenizer_and_trusted_code(
    name: str, own_code: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EFFACE_CACHE", "cache")
    written_rows(Path("rows.json"), TEXTS[:2])
    written_rows(Path("keep.json"), TEXTS[2:])
    words = [name.split(maxsplit=1)[0], *WITH_CODE[name].split()]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "--tokenizer" in told or "--trust-remote-code" in told
    assert main([*words, "--tokenizer", "tokenizer"]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not Path("code_ran").exists()
    assert main([*words, "--tokenizer", "tokenizer", "--trust-remote-code"]) == 0
    if Path("out/config.json").exists() and not name.endswith("anew"):
        assert Path("out/tokenizer.json").exists()
        again = load_model("out", trust_remote_code=True)  # the code was saved with the model
        assert type(again).__name__ == "OwnForCausalLM"
