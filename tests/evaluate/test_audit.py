"""Tests of the audit on small trained models: a model that knows more leaks more, no side effects, files, messages."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from efface.cli.audit import audit_data
from efface.cli.main import main
from efface.evaluate.audit import VIEWS, AuditResult, BestOf, Clues, Relearn, Translated, View, audit, side_by_side
from efface.evaluate.audit.relearn import unchanged
from efface.evaluate.audit.result import cells, markdown
from efface.hf.model.loading import load_model
from efface.hf.model.lora import add_lora
from efface.hf.train.trainer import FinetuneTrainer
from efface.simulate.authors import ROWS_PER_AUTHOR, make_authors
from efface.simulate.teach import train_tokenizer
from support.helpers import arguments, tiny_llama, written_rows

Row = dict[str, Any]
# every view, with few variants and short answers to save time
SMALL: list[str | View] = [
    *("direct", "cloze", "choice"),
    Translated(languages=("es",)),
    BestOf(samples=2),
    Clues(clues=(1,)),
    Relearn(steps=4, learning_rate=1e-3),
]
OPTIONS: dict[str, Any] = {"group_size": ROWS_PER_AUTHOR, "max_new_tokens": 16}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [dict(row) for row in make_authors(4)]


@pytest.fixture(scope="module")
def forget(rows: list[Row]) -> list[Row]:
    return rows[2 * ROWS_PER_AUTHOR :]


@pytest.fixture(scope="module")
def tokenizer(rows: list[Row]) -> PreTrainedTokenizerBase:
    return train_tokenizer((row[name] for row in rows for name in ("question", "answer", "paraphrased_answer")), 800)


def taught(rows: list[Row], tokenizer: PreTrainedTokenizerBase, folder: Path) -> LlamaForCausalLM:
    end = tokenizer.eos_token_id
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}
    model = tiny_llama(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **sizes)
    settings = {"num_train_epochs": 30, "pairs_per_step": 8, "learning_rate": 4e-3, "lr_scheduler_type": "cosine"}
    options = arguments(folder, warmup_steps=10, logging_strategy="no", **settings)
    trainer = FinetuneTrainer(model, options, data=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model.eval()


@pytest.fixture(scope="module")
def models(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, LlamaForCausalLM]:
    folder = tmp_path_factory.mktemp("models")
    made = {"full": taught(rows, tokenizer, folder), "retain": taught(rows[: 2 * ROWS_PER_AUTHOR], tokenizer, folder)}
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        model.name_or_path = str(folder / name)
    return made


@pytest.fixture(scope="module")
def audits(
    models: dict[str, LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase, forget: list[Row]
) -> dict[str, AuditResult]:
    return {name: audit(model, tokenizer, forget, views=SMALL, **OPTIONS) for name, model in models.items()}


@pytest.mark.parametrize("view", VIEWS)
def test_the_full_model_leaks_more_than_the_retain_model(view: str, audits: dict[str, AuditResult]) -> None:
    full, retain = (audits[name].views[view].figures for name in ("full", "retain"))
    assert full["mean"] > 1.5 * retain["mean"]
    assert full["best"] > retain["best"]
    assert 0 <= full["mean"] <= full["best"] <= 1
    assert full["rows"] == retain["rows"] > 0


def test_figures_of_views(audits: dict[str, AuditResult], forget: list[Row]) -> None:
    views = audits["full"].views
    assert views["choice"].figures["chance_accuracy"] == pytest.approx(1 / 6)
    assert views["choice"].figures["accuracy"] > 0.5
    best = views["best-of-n"].figures
    assert list(best["best_of"]) == ["1", "2"]
    assert best["best_of"]["1"] == pytest.approx(best["mean"])
    assert best["best_of"]["2"] == pytest.approx(best["best"])
    relearned = views["relearn"].figures
    assert relearned["gain"] == pytest.approx(relearned["mean"] - relearned["before"])
    asked = {record["row"] for record in views["relearn"].records}
    assert len(asked) == len(forget) - 3  # a tenth of the 32 rows was trained on
    # before relearning, the answers are those of the direct view
    direct = {record["row"]: record for record in views["direct"].records}
    before = [record for record in views["relearn"].records if record["label"] == "before"]
    assert all(record["generations"] == direct[record["row"]]["generations"] for record in before)
    assert any(
        record["generations"] != direct[record["row"]]["generations"]
        for record in views["relearn"].records
        if record["label"] == "after"
    )
    json.dumps(audits["full"].to_json(), allow_nan=False)


def test_the_table(audits: dict[str, AuditResult]) -> None:
    headings, lines = cells({**audits, "again": audits["full"]})
    assert headings == ["view", "full", "retain", "again", "kept"]
    assert [line[0] for line in lines if ", " not in line[0]] == [*VIEWS]
    assert lines[0][-1] == "100 %"
    assert all(line[1] == line[3] for line in lines)
    text = markdown(headings, lines).splitlines()
    assert text[1] == "| --- | ---: | ---: | ---: | ---: |"
    (line, *_) = side_by_side(audits)
    assert (line.view, line.what) == ("direct", "")
    assert line.kept("retain", "full", "retain") == 0
    assert line.kept("full", "retain", "full") is None
    other = AuditResult(3, audits["full"].views)
    with pytest.raises(
        ValueError, match="expected the same rows and views, got 'full' .32 rows; direct, .* and 'other' .3 rows; "
    ):
        side_by_side({"full": audits["full"], "other": other})


def test_an_audit_repeats_itself_and_resumes(
    models: dict[str, LlamaForCausalLM],
    audits: dict[str, AuditResult],
    tokenizer: PreTrainedTokenizerBase,
    forget: list[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = tmp_path / "rows.sqlite"
    again = audit(models["full"], tokenizer, forget, views=SMALL, store=store, **OPTIONS)
    assert again.to_json() == audits["full"].to_json()

    def computed(*args: Any) -> None:
        raise AssertionError("computed anew")

    # every result is found in the store; also those of the relearned model, because relearning is deterministic
    monkeypatch.setattr("efface.evaluate.generation.GenerationTask.run", computed)
    monkeypatch.setattr("efface.evaluate.likelihood.AnswerTask.run", computed)
    found = audit(models["full"], tokenizer, forget, views=SMALL, store=store, **OPTIONS)
    assert found.to_json() == again.to_json()
    with pytest.raises(AssertionError, match="computed anew"):
        audit(models["retain"], tokenizer, forget, views=SMALL, store=store, **OPTIONS)


def tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.state_dict().items()
    yield from model.named_buffers()


@pytest.mark.parametrize("lora_r", [None, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_relearning_leaves_the_model_as_it_was(
    lora_r: int | None, tied: bool, tokenizer: PreTrainedTokenizerBase, forget: list[Row]
) -> None:
    model = tiny_llama(vocab_size=len(tokenizer), tie_word_embeddings=tied, max_position_embeddings=256)
    model.train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    grad = model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {name: (value.clone(), value.data_ptr()) for name, value in tensors(model)}
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    flags = [weight.requires_grad for weight in model.parameters()]
    attributes, attention, noise = set(vars(model)), model.config._attn_implementation, torch.get_rng_state()
    settings = model.config.to_dict()
    view = Relearn(steps=2, learning_rate=0.1, lora_r=lora_r)
    for _ in range(2):
        result = audit(model, tokenizer, forget[:8], views=[view], group_size=8, max_new_tokens=2)
        generations = {
            label: [record["generations"] for record in result.views["relearn"].records if record["label"] == label]
            for label in ("before", "after")
        }
        assert generations["before"] != generations["after"]
        assert [(name, type(module), module.training) for name, module in model.named_modules()] == modules
        now = dict(tensors(model))
        assert now.keys() == before.keys()
        for name, (value, place) in before.items():
            assert torch.equal(now[name], value), name
            assert now[name].data_ptr() == place, name
        assert [weight.requires_grad for weight in model.parameters()] == flags
        assert model.lm_head.weight.grad is grad
        assert torch.equal(grad, torch.ones_like(grad))
        assert sum(weight.grad is not None for weight in model.parameters()) == 1
        # in addition to efface's own cached attributes
        assert {name for name in vars(model) if not name.startswith("_efface_")} == attributes
        assert model.config._attn_implementation == attention
        assert model.config.to_dict() == settings
        assert torch.equal(torch.get_rng_state(), noise)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_a_saved_adapter_is_audited_too(
    models: dict[str, LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase, forget: list[Row], tmp_path: Path
) -> None:
    """transformers loads an adapter with a frozen base model; relearning trains all weights nevertheless."""
    add_lora(load_model(models["full"].name_or_path), r=2).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    before = {name: value.clone() for name, value in tensors(model)}
    flags = [weight.requires_grad for weight in model.parameters()]
    view = Relearn(steps=2, learning_rate=1e-2)
    found = audit(model, tokenizer, forget[:8], views=[view], max_new_tokens=8).views["relearn"]
    assert found.figures["gain"] != 0
    assert all(torch.equal(value, before[name]) for name, value in tensors(model))
    assert [weight.requires_grad for weight in model.parameters()] == flags


@pytest.mark.parametrize("view", ["direct", "choice", "best-of-n"])
def test_a_broken_model_is_an_error(view: str, tokenizer: PreTrainedTokenizerBase, forget: list[Row]) -> None:
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="expected finite log"):
        audit(model, tokenizer, forget[:2], views=[view], max_new_tokens=2)


def test_a_failed_block_leaves_the_model_as_it_was() -> None:
    model = tiny_llama()
    before = {name: value.clone() for name, value in tensors(model)}

    def broken() -> None:
        with unchanged(model), torch.no_grad():
            for weight in model.parameters():
                weight.mul_(2).add_(float("nan"))
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        broken()
    assert all(torch.equal(value, before[name]) for name, value in tensors(model))


def test_views_are_checked_before_anything_is_asked(tokenizer: PreTrainedTokenizerBase, forget: list[Row]) -> None:
    nobody: Any = None
    with pytest.raises(ValueError, match=r"expected some of direct, cloze, .*, got 'riddle'"):
        audit(nobody, tokenizer, forget, views=["direct", "riddle"])
    with pytest.raises(ValueError, match="expected at least one, each only once, got direct, direct"):
        audit(nobody, tokenizer, forget, views=["direct", "direct"])
    with pytest.raises(ValueError, match="expected at least one, each only once, got none"):
        audit(nobody, tokenizer, forget, views=[])
    plain = [{name: row[name] for name in ("question", "answer")} for row in forget]
    with pytest.raises(ValueError, match="view 'choice': expected false answers in column 'perturbed_answer'"):
        audit(nobody, tokenizer, plain, views=["direct", "choice"])
    with pytest.raises(ValueError, match="view 'clues': expected an author for every row, .* that divides 32"):
        audit(nobody, tokenizer, forget, views=["direct", "clues"])


def test_rows_without_novel_words_are_left_out(
    models: dict[str, LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"question": "Does she?", "answer": "Yes, she does."}]
    result = audit(models["full"], tokenizer, rows, views=["direct", "cloze", BestOf(samples=2)], max_new_tokens=2)
    for name, found in result.views.items():
        assert (found.figures["rows"], found.figures["left_out"], found.figures["mean"]) == (0, 1, None), name
        assert found.records[0]["generations"] == []
    assert cells({"a": result})[1][0] == ["direct", "-"]


@pytest.fixture
def data(tmp_path: Path, forget: list[Row]) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    written_rows(folder / "forget10_perturbed.json", forget[:16])
    return folder


def test_the_command(
    models: dict[str, LlamaForCausalLM], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, retain = (models[name].name_or_path for name in ("full", "retain"))
    words = ["audit", "--model", full, "--full", full, "--retain", retain, "--data", str(data), "--split", "forget10"]
    words += ["--views", "direct,choice,clues", "--clues", "2", "--group-size", "16", "--max-new-tokens", "12"]
    words += ["--output", str(tmp_path / "out")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "clues, 2 revealed" in shown
    record = json.loads((tmp_path / "out" / "AUDIT.json").read_text())
    assert list(record["models"]) == ["full", full, "retain"]
    assert record["rows"] == 16
    assert record["settings"]["views"]["clues"] == {"clues": [2]}
    assert record["models"]["full"]["views"] == record["models"][full]["views"]
    (first, *_) = record["models"]["full"]["views"]["direct"]["records"]
    assert set(first) == {"row", "label", "prompt", "reference", "novel", "generations", "novel_recall"}
    text = (tmp_path / "out" / "AUDIT.md").read_text()
    assert "16 rows" in text
    assert "| direct | " in text
    assert "| 100 % |" in text
    # an existing audit is not overwritten without --overwrite; with it, known rows are not computed again
    assert main(words) == 2
    assert "exists; choose another --output, or add --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--json"]) == 0
    assert json.loads((tmp_path / "out" / "AUDIT.json").read_text()) == record
    found = json.loads(capsys.readouterr().out)["models"]
    assert found["full"]["direct"] == record["models"]["full"]["views"]["direct"]["figures"]


MISTAKES = [
    (["--views", "direct,riddle"], "expected some of direct, cloze"),
    (["--split", "forget11"], "got splits forget10"),
    (["--group-column", "identity_id", "--views", "clues"], "expected a column 'identity_id'"),
    (["--views", "clues"], "got rows without one; set `group_column`"),
    (["--relearn-share", "2"], "`share`: expected between 0 and 1"),
    (["--relearn-lr", "-1"], "`learning_rate`: expected a positive number, got -1.0"),
    (["--relearn-lr", "inf"], "`learning_rate`: expected a positive number, got inf"),
    (["--relearn-lora-r", "0"], "`lora_r`: expected at least 1, got 0"),
    (["--seed", "4294967296"], "--seed: expected 0 .. 4294967295, got '4294967296'"),
    (["--clues", "0"], "`clues`: expected numbers of at least 1"),
    (["--samples", "0"], "`n`: expected at least 1 answer, got 0"),
    (["--temperature", "0"], "`temperature`: expected a positive number, got 0.0"),
    (["--views", "direct", "--full", "./nowhere"], "model folder './nowhere' does not exist"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_are_explained(
    words: list[str],
    message: str,
    models: dict[str, LlamaForCausalLM],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = models["full"].name_or_path
    given = ["audit", "--model", place, "--data", str(data), "--split", "forget10", "--output", str(tmp_path / "out")]
    assert main([*given, *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "AUDIT.json").exists()


def test_audit_data(data: Path) -> None:
    file = data / "forget10_perturbed.json"
    assert len(audit_data(str(file), None)) == len(audit_data(str(file), "forget10")) == 16
    with pytest.raises(ValueError, match="--split forget05: expected a folder or a file of that split"):
        audit_data(str(file), "forget05")
    assert len(audit_data(str(data), None)) == 16  # forget10
    with pytest.raises(ValueError, match="expected a data set of that split"):
        audit_data("locuslab/TOFU:forget10_perturbed", "forget05")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        audit_data(str(data / "none.json"), None)
