"""Models by name and revision: folders, the Hub's cache, and repositories whose main branch is empty."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from helpers import tiny_llama, tiny_tokenizer

from efface.cli.main import main
from efface.hf import loading
from efface.hf.loading import load_model, load_tokenizer, local_revision


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
    with pytest.raises(FileNotFoundError, match="no weights at revision 'checkpoint-13'.*has revisions checkpoint-12"):
        load_model(str(tmp_path), revision="checkpoint-13")


def test_a_folder_with_checkpoints_alone_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (2, 12):
        saved(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "run.json").write_text("{}")
    words = ["unlearn", "--model", str(tmp_path), "--forget", "f.json", "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--use_cpu", "True"]) == 2
    told = capsys.readouterr().err
    assert "it has revisions checkpoint-2, checkpoint-12. Choose one, such as `--revision checkpoint-12`" in told


def test_the_layout_of_the_hub_cache(tmp_path: Path) -> None:
    weights = saved(tmp_path / "snapshots" / "abc", 3)
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "checkpoint-12").write_text("abc")
    assert torch.equal(load_model(str(tmp_path), revision="checkpoint-12").lm_head.weight, weights)
    with pytest.raises(FileNotFoundError, match="at revision 'main'; it has revisions checkpoint-12"):
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
    """Such as the Phi-1.5 models of TOFU. Offline the real library fails as it does where files are missing."""
    phi = FakeFiles({"main": ["README.md", ".gitattributes"], "checkpoint-6": WEIGHTS, "checkpoint-12": WEIGHTS})
    message = (
        "model 'me/phi': no weights at revision 'main'; it has revisions checkpoint-6, checkpoint-12. Choose one, such "
        "as `--revision checkpoint-12`"
    )
    for load in (load_model, load_tokenizer):
        with pytest.raises(FileNotFoundError, match=message):
            load("me/phi", client=phi)
    with pytest.raises(FileNotFoundError, match="no weights at revision 'checkpoint-7'; it has revisions main, check"):
        load_model("me/phi", revision="checkpoint-7", client=phi)


@pytest.mark.parametrize(
    "client", [FakeFiles({"main": WEIGHTS, "dev": WEIGHTS}), FakeFiles({"main": ["README.md"]}), Unreachable({})]
)
def test_another_trouble_keeps_its_own_words(client: FakeFiles) -> None:
    with pytest.raises(OSError, match="connect") as caught:
        load_model("me/phi", client=client)
    assert "no weights at revision" not in str(caught.value)


def test_the_revision_reaches_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def from_pretrained(name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
        asked.update(options, name=name)
        return tiny_llama(), {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    assert isinstance(loading.load_model("me/phi", revision="checkpoint-12"), transformers.LlamaForCausalLM)
    assert (asked["name"], asked["revision"], asked["dtype"]) == ("me/phi", "checkpoint-12", "auto")


def test_a_path_that_does_not_exist_is_no_name_on_the_hub() -> None:
    with pytest.raises(FileNotFoundError, match=r"model folder './nowhere' does not exist"):
        load_model("./nowhere")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is here")
def test_eight_bits_need_their_package(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ImportError, match=r"8-bit models need the package bitsandbytes.*pip install"):
        load_model(str(tmp_path), load_in_8bit=True)
