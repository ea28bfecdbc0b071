"""Tests of the cached reference in a run: computed once, checked, shared, rejected if wrong."""

import functools
import gc
import sqlite3
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback

from efface import NPO, UnlearnTrainer
from efface.batching import Role, TokenStore, pack_items, pack_store
from efface.cli.main import main
from efface.cli.progress import ProgressBar
from efface.hf.model.fingerprint import fingerprint
from efface.hf.model.head import fuse
from efface.hf.reference import cached as cached_reference
from efface.hf.reference.cached import CachedReference, ReferenceCallback
from efface.hf.reference.score import packed_logprobs, store_logprobs
from support.helpers import arguments, random_store, tiny_llama, tiny_tokenizer, written_rows
from support.processes import RANKS, launch


class Scored(list[int]):
    """The number of sequences that each forward pass of a reference scored."""

    @property
    def total(self) -> int:
        return sum(self)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Scored:
    """Count the forward passes of references. A budget of 60 tokens splits the sequences into several passes."""
    counts = Scored()

    def counting(*args: Any, **options: Any) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        for index, sums in packed_logprobs(*args, **options, token_budget=60):
            counts.append(len(index))
            yield index, sums

    monkeypatch.setattr(cached_reference, "packed_logprobs", counting)
    return counts


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "reference.sqlite"


def reference(model: Any, path: Path | str | None, forget: TokenStore, **options: Any) -> CachedReference:
    return CachedReference(model, {Role.FORGET: forget}, cache=path, **options)


def sums_of(made: CachedReference, count: int, role: Role = Role.FORGET) -> torch.Tensor:
    return made._sums[role][:count]


def test_values_are_computed_once_and_read_bit_for_bit(path: Path, scored: Scored) -> None:
    model, forget = tiny_llama(), random_store(40)
    expected = store_logprobs(model, forget, token_budget=60)
    first = reference(model, path, forget)
    assert torch.equal(sums_of(first, 40), expected)
    assert (first.sequences, first.computed, first.path, scored.total) == (40, 40, path, 40)
    scored.clear()
    second = reference(tiny_llama(), path, forget)
    assert torch.equal(sums_of(second, 40), expected)
    assert (second.sequences, second.computed, second.path) == (40, 0, path)
    assert scored.total == 4  # the sample for the check
    scored.clear()
    more = random_store(43)
    third = reference(model, path, TokenStore([*more.chunks, *forget.chunks]))
    assert third.computed == len(set(map(bytes, more)) - set(map(bytes, forget)))
    assert scored.total == third.computed + 4


def test_equal_sequences_and_alternates_are_scored_once(path: Path, scored: Scored) -> None:
    model = tiny_llama()
    forget = TokenStore.from_sequences([[5, 6, 7], [8, 9], [5, 6, 7], [5, 6, 7]], [1, 1, 1, 2])
    alternate = TokenStore.from_sequences([[8, 9], [4, 3, 2], [4, 3, 2], [1, 2]], [1, 1, 1, 1])
    retain = random_store(3)
    made = CachedReference(model, {Role.FORGET: forget, Role.ALTERNATE: alternate}, cache=path)
    assert (made.sequences, made.computed, scored.total) == (5, 5, 5)
    roles = np.array([Role.FORGET, Role.ALTERNATE, Role.FORGET, Role.ALTERNATE, Role.RETAIN, Role.RETAIN], np.int8)
    batch = pack_items((forget, retain, alternate), roles, np.array([3, 1, 1, 0, 2, 0]))
    expected = torch.zeros(6)
    expected[[0, 2]] = store_logprobs(model, forget)[[3, 1]]
    expected[[1, 3]] = store_logprobs(model, alternate)[[1, 0]]
    assert torch.allclose(made.sums(batch), expected, rtol=1e-5)
    assert expected[2] == pytest.approx(expected[3].item(), rel=1e-5)


def test_only_changes_that_affect_the_numbers_cause_recomputation(path: Path, tmp_path: Path) -> None:
    forget = random_store(6)

    def computed(model: LlamaForCausalLM, autocast: bool = False) -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return reference(model, path, forget).computed

    changed = tiny_llama()
    changed.model.layers[1].mlp.up_proj.weight.data.view(torch.int32)[3, 4] ^= 1
    assert computed(tiny_llama()) == 6
    assert computed(changed) == 6
    assert computed(tiny_llama().to(torch.bfloat16)) == 6
    assert computed(tiny_llama(), autocast=True) == 6
    assert computed(tiny_llama(rope_theta=20_000.0)) == 6
    # changes that do not affect the numbers cause no recomputation
    assert computed(fuse(tiny_llama(seed=0, attention_bias=False))) == 0
    tiny_llama().save_pretrained(tmp_path / "saved")
    for _ in range(2):
        assert computed(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")) == 0
    untied = tiny_llama(tie_word_embeddings=False)
    untied.load_state_dict(tiny_llama().state_dict())
    untied.config.use_cache = False
    assert computed(untied.train().requires_grad_(False)) == 0


def test_an_adapter_that_is_switched_off_is_its_base_model(path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    base = fingerprint(tiny_llama())
    found = []
    for seed in (1, 2):
        model = tiny_llama()
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["q_proj", "up_proj"], modules_to_save=["norm"], use_dora=seed == 2)
        )
        found.append(fingerprint(wrapped))
        with wrapped.disable_adapter():
            assert fingerprint(wrapped) == base
    assert len({base, *found}) == 3


def test_another_adapter_or_scale_of_the_same_weights_is_another_model() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(tiny_llama(), config)
    wrapped.add_adapter("second", config)
    found = [fingerprint(wrapped)]
    wrapped.set_adapter("second")
    found.append(fingerprint(wrapped))
    for module in wrapped.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("second", 0.5)
    found.append(fingerprint(wrapped))
    assert len(set(found)) == 3
    wrapped.set_adapter("default")
    assert fingerprint(wrapped) == found[0]


def test_an_interrupted_run_keeps_its_computed_values(path: Path, scored: Scored) -> None:
    model, forget = tiny_llama(), random_store(40)

    def stop(computed: int, missing: int, sequences: int) -> None:
        assert (missing, sequences) == (40, 40)
        if computed >= 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reference(model, path, forget, progress=stop)
    done = scored.total
    assert 15 <= done < 40
    seen: list[tuple[int, int, int]] = []
    made = reference(model, path, forget, progress=lambda *counts: seen.append(counts))
    assert made.computed == 40 - done
    assert seen[0] == (0, 40 - done, 40)
    assert seen[-1] == (40 - done, 40 - done, 40)
    assert len(seen) > 2
    assert torch.allclose(sums_of(made, 40), store_logprobs(model, forget), rtol=1e-5)


def test_the_reference_model_is_freed(path: Path) -> None:
    for _ in range(2):  # computed the first time, read the second
        model = tiny_llama(seed=3)
        gone = weakref.ref(model)
        trainer = UnlearnTrainer(
            tiny_llama(),
            arguments(path.parent / "out", reference_cache=str(path)),
            forget=random_store(8, seed=1),
            retain=random_store(8, seed=2),
            objective=NPO(),
            reference_model=model,
        )
        del model
        gc.collect()
        assert gone() is None
        assert isinstance(trainer.reference, CachedReference)


# --- rejected


def edit(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute(statement)
        database.commit()


def test_another_models_values_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the fingerprint missed a difference."""
    forget = random_store(30)
    monkeypatch.setattr(cached_reference, "fingerprint", lambda model: bytes(16))
    reference(tiny_llama(), path, forget)
    other = tiny_llama()
    other.model.norm.weight.data *= 1.02
    with pytest.raises(
        ValueError, match=rf"reference cache '{path}': expected the log-probability .*delete the file, or set"
    ):
        reference(other, path, forget)
    close = tiny_llama()
    close.model.norm.weight.data *= 1 + 1e-6  # as much as two devices can differ
    assert reference(close, path, forget).computed == 0


@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16, torch.float16, None], ids=str)
def test_scoring_in_other_batches_is_not_a_mismatch(
    precision: torch.dtype | None, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding depends on the other sequences in a pass, and the sample is scored in different passes."""
    forget = random_store(60, low=4, high=60)
    model = tiny_llama(initializer_range=0.3).to(precision or torch.float32)  # large logits
    for budget in (100, 1000, 10_000):
        scorer = functools.partial(packed_logprobs, token_budget=budget)
        monkeypatch.setattr(cached_reference, "packed_logprobs", scorer)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is None):
            monkeypatch.setattr(cached_reference, "_SAMPLE", 60)
            reference(model, path, forget)


def test_values_that_are_not_finite_are_not_kept(path: Path) -> None:
    model = tiny_llama()
    model.model.norm.weight.data.fill_(float("nan"))
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="got NaN or infinity; check its weights"):
            reference(model, path, random_store(5))
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*) FROM logprobs").fetchone() == (0,)


def test_a_damaged_file_stops_the_run(path: Path) -> None:
    path.write_text("not a database" * 100)
    with pytest.raises(ValueError, match="file is not a database; delete the file"):
        reference(tiny_llama(), path, random_store(5))


def test_a_place_that_cannot_be_used_costs_a_warning(path: Path) -> None:
    path.write_text("")
    forget = random_store(5)
    expected = store_logprobs(tiny_llama(), forget)
    with pytest.warns(UserWarning, match="cannot use the reference cache .* --reference-cache none"):
        made = reference(tiny_llama(), path / "below a file", forget)
    assert torch.equal(sums_of(made, 5), expected)
    assert made.path is None
    assert isinstance(made.problem, OSError)


def test_a_file_that_is_full_costs_a_warning(path: Path, monkeypatch: pytest.MonkeyPatch, scored: Scored) -> None:
    store = cached_reference.ReferenceCache.__init__.__globals__["LogprobStore"]
    put = store.put

    def full(self: Any, *args: Any) -> None:
        if scored.total > 20:
            raise OSError("database or disk is full")
        put(self, *args)

    monkeypatch.setattr(store, "put", full)
    forget = random_store(40)
    with pytest.warns(UserWarning, match="disk is full") as caught:
        made = reference(tiny_llama(), path, forget)
    assert len(caught) == 1
    assert made.path is None
    assert torch.allclose(sums_of(made, 40), store_logprobs(tiny_llama(), forget), rtol=1e-5)


def test_none_keeps_no_file(tmp_path: Path, scored: Scored) -> None:
    for _ in range(2):
        assert reference(tiny_llama(), "none", random_store(5)).computed == 5
    assert not (tmp_path / "efface-cache").exists()
    assert scored.total == 10


def test_the_default_is_in_the_cache_folder(tmp_path: Path) -> None:
    made = reference(tiny_llama(), None, random_store(5))
    assert made.path == tmp_path / "efface-cache" / "reference.sqlite"
    assert made.path.is_file()


# --- runs


def run(tmp_path: Path, **options: Any) -> tuple[list[float], UnlearnTrainer]:
    losses: list[float] = []

    class Logs(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    trainer = UnlearnTrainer(
        tiny_llama(),
        arguments(tmp_path / "out", seed=options.pop("seed", 1), **options),
        forget=random_store(12, seed=1),
        retain=random_store(20, seed=2),
        objective=NPO(beta=0.2),
        callbacks=[Logs()],
    )
    trainer.train()
    return losses, trainer


def test_a_run_from_the_cache_is_the_run_that_filled_it(tmp_path: Path) -> None:
    first, filling = run(tmp_path)
    second, reading = run(tmp_path)
    _, sweeping = run(tmp_path, seed=2, learning_rate=1e-4)
    assert first == second
    assert isinstance(filling.reference, CachedReference)
    assert isinstance(reading.reference, CachedReference)
    assert isinstance(sweeping.reference, CachedReference)
    assert [filling.reference.computed, reading.reference.computed, sweeping.reference.computed] == [12, 0, 0]


def test_callbacks_follow(tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []

    class Follower(ReferenceCallback):
        def on_reference(self, computed: int, missing: int, sequences: int) -> None:
            seen.append((computed, missing, sequences))

    for _ in range(2):
        UnlearnTrainer(
            tiny_llama(),
            arguments(tmp_path),
            forget=random_store(12, seed=1),
            retain=random_store(20, seed=2),
            objective=NPO(),
            callbacks=[Follower()],
        )
    assert seen == [(0, 12, 12), (12, 12, 12), (0, 0, 12)]


# --- the command line


@pytest.fixture
def flags(checkpoint: Path, tmp_path: Path) -> list[str]:
    """Return the flags on which a log-probability depends."""
    data = written_rows(tmp_path / "rows.json")
    return ["--model", str(checkpoint), "--forget", str(data), "--use_cpu", "True"]


@pytest.fixture
def unlearn(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs one step of `efface unlearn` and returns its messages about the reference."""

    def run(*changes: str, code: int = 0) -> str:
        capsys.readouterr()
        words = ["--alpha", "0", "--output_dir", str(tmp_path / "out"), "--overwrite", "True", "--max_steps", "1"]
        assert main(["unlearn", *flags, *words, "--save_strategy", "no", *changes]) == code
        said = capsys.readouterr().err
        return said if code else next(line for line in said.splitlines() if "reference, " in line)

    return run


def test_a_second_command_computes_nothing(unlearn: Callable[..., str], scored: Scored) -> None:
    assert unlearn() == "npo · model: reference, 5 of 5 sequences to compute"
    assert scored.total == 5
    assert unlearn() == "npo · model: reference, 0 of 5 sequences to compute"
    assert scored.total == 5 + 4  # the sample
    for changes in (["--seed", "3"], ["--beta", "0.5", "--learning_rate", "1e-4"], ["--pairs_per_step", "2"]):
        assert "0 of 5" in unlearn(*changes)
    for changes in (["--template", "llama-2"], ["--bf16", "True"], ["--dtype", "bfloat16"]):
        assert "5 of 5" in unlearn(*changes)
        assert "0 of 5" in unlearn(*changes)


def test_other_weights_are_scored_again(unlearn: Callable[..., str], checkpoint: Path) -> None:
    assert "5 of 5" in unlearn()
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.model.norm.weight.data[0] += 1e-6
    model.save_pretrained(checkpoint)
    assert "5 of 5" in unlearn()


@pytest.mark.parametrize("precision", [[], ["--bf16", "True"], ["--dtype", "bfloat16"]], ids=" ".join)
def test_cache_reference_fills_the_cache_for_unlearn(
    precision: list[str],
    flags: list[str],
    unlearn: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    words = ["cache-reference", *flags, *precision]
    file = tmp_path / "efface-cache" / "reference.sqlite"
    assert main(words) == 0
    assert f"5 sequences computed, 0 already cached: {file}" in capsys.readouterr().err
    assert set(tmp_path.iterdir()) - before == {tmp_path / "efface-cache"}  # and no output folder
    assert main(words) == 0
    assert f"0 sequences computed, 5 already cached: {file}" in capsys.readouterr().err
    assert "0 of 5" in unlearn(*precision)


def test_cache_reference_of_a_reference_model(
    flags: list[str], unlearn: Callable[..., str], tmp_path: Path, checkpoint: Path, path: Path
) -> None:
    other = tmp_path / "other"
    tiny_llama(seed=5, vocab_size=len(tiny_tokenizer())).save_pretrained(other)
    words = ["--reference_model", str(other), "--reference_cache", str(path)]
    assert main(["cache-reference", *flags, *words]) == 0
    assert path.is_file()
    assert "0 of 5" in unlearn(*words)
    assert "5 of 5" in unlearn("--reference_cache", str(path))
    assert "5 of 5" in unlearn()
    assert "5 of 5" in unlearn("--reference_cache", "none")


def test_cache_reference_explains_what_is_wrong(
    flags: list[str], path: Path, capsys: pytest.CaptureFixture[str], unlearn: Callable[..., str]
) -> None:
    path.write_text("mine")
    for changes, message in (
        (
            ["--objective", "simnpo"],
            "--objective: expected an objective that needs a reference, such as npo, got simnpo",
        ),
        (["--reference_cache", "none"], "expected cached and a file, got auto and none"),
        (["--reference", "live"], "--reference, --reference-cache: expected cached and a file, got live and"),
        (["--reference_cache", str(path)], "file is not a database; delete the file"),
        (["--reference_cache", str(path / "below")], f"'{path}'"),
        (["--nonsense"], "unknown arguments --nonsense; see `efface cache-reference --help`"),
    ):
        assert main(["cache-reference", *flags, *changes]) == 2
        assert message in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert "file is not a database" in unlearn("--reference_cache", str(path), code=2)


def test_the_bar_of_a_terminal(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    console = Console(force_terminal=True, width=100)
    bar = ProgressBar(console, "npo")
    for computed in (0, 2, 5):
        bar.on_reference(computed, 5, 7)
    bar.on_reference(0, 0, 7)
    shown = capsys.readouterr().out
    assert "npo: reference, 5 of 7 sequences to compute" in shown
    assert "5 of 5" in shown
    assert bar._bar is None


# --- several processes


@pytest.mark.slow
def test_two_processes_share_the_work_and_one_writes(flags: list[str], tmp_path: Path) -> None:
    words = ["cache-reference", *flags]
    ranks = [str(RANKS / "command_rank.py"), *words]
    first = launch(2, ranks)
    assert first.returncode == 0, first.stderr[-4000:]
    assert first.stderr.count("5 sequences computed, 0 already cached") == 1
    assert main(words) == 0  # on one process
    again = launch(2, ranks)
    assert "0 sequences computed, 5 already cached" in again.stderr
    (tmp_path / "efface-cache" / "reference.sqlite").write_text("mine")
    refused = launch(2, ranks)
    assert refused.returncode != 0
    assert "file is not a database" in refused.stderr


@pytest.mark.parametrize("share", [True, False])
def test_a_reference_shares_prefixes_only_if_asked(share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TokenStore.from_sequences([[5, 6, 7, 8, answer, 9] for answer in range(10, 16)], [4] * 6)
    packed: list[Any] = []

    def pack(*arguments: Any, **options: Any) -> Any:
        packed.append(pack_store(*arguments, **options))
        return packed[-1]

    monkeypatch.setattr("efface.hf.reference.score.pack_store", pack)
    CachedReference(tiny_llama(), {Role.FORGET: store}, share=share)
    assert [batch.shared for batch in packed] == [share]
