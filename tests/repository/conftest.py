"""A fixture with the working folder in which the code of README.md and docs/ runs."""

import json
from pathlib import Path

import pytest

from efface.simulate.authors import make_authors
from support.helpers import TEXTS, tiny_llama, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create the files that the pages assume: full, retain and base model, the TOFU splits, files of rows."""
    tokenizer = tiny_tokenizer()
    for seed, name in enumerate(("llama", "retain90", "base")):
        model = tiny_llama(seed=seed, vocab_size=len(tokenizer), max_position_embeddings=1024)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = make_authors(1)[:2]
    (tmp_path / "tofu").mkdir()
    for split in ("forget10", "retain", "real_authors", "world_facts"):
        (tmp_path / "tofu" / f"{split}_perturbed.json").write_text("\n".join(map(json.dumps, rows)))
    for name, rows in (("forget10", TEXTS[:2]), ("retain90", TEXTS[2:])):
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("EFFACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path
