"""Tests of training runs that run shared prefixes once: equal to runs without, also on two processes and resumed."""

import copy
import functools
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback
from transformers.utils.logging import warning_once

from efface import NPO, RMU, UnlearnTrainer
from efface.batching import PackedBatch, Role, TokenStore, pack_items, plan_epoch
from efface.hf.model.head import fuse
from efface.hf.model.packing import MEMORY, reading_of
from support.helpers import CHAT_TEXTS, LONG, arguments, saved_llama, tiny_decoder, tiny_llama, written_rows
from support.processes import RANKS, launch
from support.ranks.shared_run import CASES, Case, chat_rows, chat_stores, recorded, stored, trainer_of

STEPS = 50 if "EFFACE_LONG" in os.environ else 10

# ---- equal runs


SHORT = {"NPO, live, checkpointing", "NPO, cached, accumulation", "SimNPO", "DPO, live", "PDU", "RMU"}
SHORT |= {"LoRA, NPO and KL, adapter", "LoRA, UNDIAL, adapter"}
# With accumulation, a step has more pairs the more processes there are.
ALL = [name for name in CASES if "accumulation" not in name]
TOGETHER = ["NPO, cached", "DPO, live", "PDU", "LoRA, NPO and KL, adapter"]


@functools.cache
def unshared(name: str) -> dict[str, Any]:
    """Return the record of a run on one process without shared prefixes."""
    with tempfile.TemporaryDirectory() as folder:
        return recorded(trainer_of(Path(folder), CASES[name], share=False, max_steps=STEPS))


def check_equal(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Assert that losses and weights agree. Adam moved the weights by up to 0.05 (LoRA: 0.25) in 50 steps."""
    assert len(got["losses"]) == STEPS
    assert max(want["losses"]) - min(want["losses"]) > 1e-3 * max(map(abs, want["losses"]))
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-5)
    assert got["weights"].keys() == want["weights"].keys()
    for name, weight in got["weights"].items():
        torch.testing.assert_close(torch.tensor(weight), torch.tensor(want["weights"][name]), rtol=0, atol=1e-4)
    assert all(log["prefixes_saved"] > 0.2 for log in got["logs"])
    assert not any("prefixes_saved" in log for log in want["logs"])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in SHORT else LONG) for name in CASES])
def test_a_run_with_shared_prefixes_is_the_run_without(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, CASES[name], share=True, max_steps=STEPS)
    several = max(len(trainer._steps[step].batches) for step in range(3)) > 1
    assert several == (name != "NPO, one pass a step")
    check_equal(recorded(trainer), unshared(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "names"),
    [
        pytest.param(2, TOGETHER, id="two"),
        pytest.param(2, ALL, marks=LONG, id="two, all"),
        # Step 13 has 2 pairs, that is, 4 sequences.
        pytest.param(5, TOGETHER[:2], marks=LONG, id="five, of which one has no share of a step"),
    ],
)
def test_several_processes_with_shared_prefixes_follow_one_without(
    processes: int, names: list[str], tmp_path: Path
) -> None:
    words = [str(RANKS / "shared_run.py"), str(tmp_path), str(STEPS), *names]
    done = launch(processes, words, limit=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(processes)]
    for name in names:
        check_equal(ranks[0][name], unshared(name))
        assert all(rank[name]["weights"] == ranks[0][name]["weights"] for rank in ranks)


# ---- resumed runs


@pytest.mark.parametrize("step", [2, 6])
def test_a_resumed_run_has_the_same_bits(step: int, tmp_path: Path) -> None:
    """With dropout in the attention, a cached reference, and a checkpoint in the second epoch."""
    case = Case(NPO(), "cached", settings={"save_strategy": "steps", "save_steps": 2, "max_steps": 8})

    def run(resume: bool) -> UnlearnTrainer:
        model = tiny_llama(attention_dropout=0.2)
        settings = {"token_budget": 128, "pairs_per_step": 16, "share_prefixes": True, **case.settings}
        stores = {"forget": stored(chat_rows(20, seed=1)), "retain": stored(chat_rows(50, seed=2))}
        trainer = UnlearnTrainer(model, arguments(tmp_path, **settings), objective=case.objective, **stores)
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    whole = run(resume=False)
    for later in range(step + 1, 9):
        shutil.rmtree(tmp_path / f"checkpoint-{later}", ignore_errors=True)
    again = run(resume=True)
    for mine, theirs in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    logs = [trainer.state.log_history[:-1] for trainer in (whole, again)]
    for name in ("loss", "forget_loss", "retain_loss", "grad_norm"):
        assert [log[name] for log in logs[0]] == [log[name] for log in logs[1]]
    assert [log["prefixes_saved"] > 0.2 for log in logs[1]] == [True] * 8


@LONG
def test_a_killed_run_with_shared_prefixes_ends_with_the_same_bits(tmp_path: Path) -> None:
    model, data = (
        saved_llama(tmp_path / "model", max_position_embeddings=256),
        written_rows(tmp_path / "rows.json", CHAT_TEXTS),
    )
    words = ["unlearn", "--model", str(model), "--forget", str(data), "--retain", str(data), "--allow-overlap"]
    words += ["--use_cpu", "True", "--pairs_per_step", "2", "--num_train_epochs", "4", "--learning_rate", "1e-3"]
    words += ["--token_budget", "128", "--logging_steps", "3", "--save-schedule", "2"]
    done = launch(0, [str(RANKS / "killed_run.py"), str(tmp_path), json.dumps(words)], limit=900)
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert "failed" not in record, record["failed"][-4000:]
    assert len(record["where"]) == 10
    ends = [tmp_path / name for name in ("undisturbed", "killed")]
    assert len({(end / "model.safetensors").read_bytes() for end in ends}) == 1
    history = json.loads((ends[1] / "trainer_state.json").read_text())["log_history"]
    assert all(entry["prefixes_saved"] > 0.2 for entry in history if "loss" in entry)


# ---- runs that do not share


PARTS = ("input_ids", "position_ids", "label_rows", "targets", "sequences", "cu_seqlens", "roles", "paths", "cu_paths")
TUPLES = ("layout", "lengths", "segment_lengths", "row_offsets", "forget_sequences", "last_tokens")


def contents(batch: PackedBatch) -> dict[str, Any]:
    """Return everything in a batch, except the padding of the parts of its storage."""
    return {name: getattr(batch, name).tolist() for name in PARTS} | {name: getattr(batch, name) for name in TUPLES}


def same_run(model: Any, folder: Path, stores: dict[str, TokenStore], **settings: Any) -> list[UnlearnTrainer]:
    """Assert that runs with and without ``share_prefixes`` have the same bits; return their trainers."""
    trainers = [
        UnlearnTrainer(
            copy.deepcopy(model),
            arguments(folder, share_prefixes=share, max_steps=3, reference_cache="none", **settings),
            objective=NPO(),
            **stores,
        )
        for share in (True, False)
    ]
    batches = [[batch for step in range(3) for batch in trainer._steps[step].batches] for trainer in trainers]
    assert list(map(contents, batches[0])) == list(map(contents, batches[1]))
    assert not any(batch.shared for batch in batches[0])
    records = list(map(recorded, trainers))
    for record in records:
        for log in record["logs"]:
            for name in [name for name in log if name.startswith(("time_", "peak_", "tokens_per"))]:
                del log[name]
    assert records[0] == records[1]
    assert not any("prefixes_saved" in log for log in records[0]["logs"])
    return trainers


def test_without_sharing_batches_are_those_of_the_plan(tmp_path: Path) -> None:
    """The whole sequences, in the micro-batches that the token budget gives without shared tokens."""
    stores = chat_stores()
    trainer = trainer_of(tmp_path, CASES["DPO, live"], share=False)
    forget, retain, alternate = stores.values()
    plan = plan_epoch(
        forget.lengths,
        retain.lengths,
        alternates=alternate.lengths,
        pairs_per_step=4,
        token_budget=128,
        seed=trainer.args.seed,
        epoch=0,
    )
    assert len(trainer._steps) == len(plan)
    for step in range(len(plan)):
        planned = [
            pack_items((forget, retain, alternate), part.roles, part.sequences) for part in plan.micro_batches(step)
        ]
        batches = trainer._steps[step].batches
        assert list(map(contents, batches)) == list(map(contents, planned))
        for batch in batches:
            assert batch.last_tokens
            assert not batch.shared
            assert batch.segment_lengths == batch.lengths


@pytest.mark.parametrize("name", ["NPO, cached", "DPO, live", "RMU"])
def test_steps_and_budget_with_sharing(name: str, tmp_path: Path) -> None:
    """A step has the same sequences as without, fewer micro-batches, and none exceeds the budget."""
    shared, apart = (trainer_of(tmp_path, CASES[name], share=share) for share in (True, False))
    assert len(shared._steps) == len(apart._steps)
    for step in range(len(apart._steps)):
        ours, theirs = shared._steps[step], apart._steps[step]
        assert ours.totals == theirs.totals
        assert sequences(ours.batches) == sequences(theirs.batches)
        assert len(ours.batches) < len(theirs.batches)
        assert ours.tokens == theirs.tokens
        for batch in ours.batches:
            assert batch.tokens <= 128
            # RMU reads the activations at last tokens
            assert batch.last_tokens == isinstance(CASES[name].objective, RMU)


def sequences(batches: Any) -> list[tuple[int, int]]:
    return sorted(
        pair for batch in batches for pair in zip(batch.roles.tolist(), batch.sequences.tolist(), strict=True)
    )


@pytest.mark.filterwarnings("ignore:.*runs one sequence per pass:UserWarning")  # said of a recurrent model
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mamba", "it runs one sequence per pass"),
        ("stablelm", "its attention is 'eager', not 'efface_varlen'"),
        ("longrope", "sequences of 32 tokens and more change its position encoding"),
        ("measured", "with shared tokens a small batch gave other logits"),
    ],
)
def test_a_model_that_cannot_share_says_so_once_and_trains_the_same(
    kind: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "longrope":
        rope = {"rope_type": "longrope", "factor": 8.0, "short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 9.0, 17.0]}
        positions = {"max_position_embeddings": 256, "original_max_position_embeddings": 32}
        rope |= {"rope_theta": 100.0, "original_max_position_embeddings": 32}
        model: Any = tiny_llama(rope_theta=100.0, rope_scaling=rope, **positions)
    elif kind == "measured":
        model = fuse(tiny_llama())
        setattr(model, MEMORY, replace(reading_of(model), shares=False))
    else:
        model = tiny_decoder(kind)
    warning_once.cache_clear()
    rows = {"forget": stored(chat_rows(8, seed=1)), "retain": stored(chat_rows(8, seed=2))}
    same_run(model, tmp_path, rows, pairs_per_step=2, token_budget=128)
    UnlearnTrainer(copy.deepcopy(model), arguments(tmp_path), objective=NPO(), **rows)
    said = [entry.getMessage() for entry in caplog.records if "shared prefixes" in entry.getMessage()]
    assert said == [f"{type(model).__name__}: runs shared prefixes again for each sequence: {reason}"]


@pytest.mark.parametrize(("prefix", "worth"), [(1, False), (3, True)])
def test_sharing_that_saves_little_is_not_used(prefix: int, worth: bool, tmp_path: Path) -> None:
    """Less than 1/32 of the tokens is not worth it, because reading keys along paths has a cost."""
    sets = {"forget": (20, 1), "retain": (400, 2)}  # a retain row that is drawn twice in a step shares all tokens
    rows = {name: stored(chat_rows(n, seed=seed, prefix=prefix, low=40)) for name, (n, seed) in sets.items()}
    if worth:
        trainer = UnlearnTrainer(tiny_llama(), arguments(tmp_path), objective=NPO(), **rows)
        assert 1 / 32 < trainer._steps.prefixes_saved < 0.1
        assert all(batch.shared for batch in trainer._steps[0].batches)
    else:
        trainers = same_run(tiny_llama(), tmp_path, rows)
        assert trainers[0]._steps.prefixes_saved == 0


def test_an_objective_without_retain_sequences_shares_too(tmp_path: Path) -> None:
    stores = {**chat_stores(), "retain": TokenStore.empty()}
    trainer = UnlearnTrainer(tiny_llama(), arguments(tmp_path), objective=NPO(alpha=0.0), **stores)
    batch = trainer._steps[0].batches[0]
    assert batch.shared
    assert {Role(role) for role in batch.roles.tolist()} == {Role.FORGET}
    trainer.train()


# ---- torch.compile


@LONG
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler reads .grad
@pytest.mark.parametrize("name", ["NPO, cached", "LoRA, NPO, adapter"])
def test_a_compiled_run_makes_no_graph_for_every_tree(name: str, tmp_path: Path) -> None:
    graphs: list[int] = []

    class Counted(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            graphs.append(counters["stats"]["unique_graphs"])

    # traces and breaks graphs like the default, without a C++ compiler
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer = trainer_of(tmp_path, CASES[name], share=True, max_steps=STEPS, **compiled)
    trainer.add_callback(Counted())
    check_equal(recorded(trainer), unshared(name))
    assert 0 < graphs[4] == graphs[-1]  # after five steps the compiler knows which sizes vary
