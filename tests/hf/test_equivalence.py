"""Tests of runs that must be equal: on several processes (gloo, CPU), compiled, and in a padded eager loop."""

import functools
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, TrainerCallback

import efface
from efface import (
    CEU,
    DPO,
    NPO,
    PDU,
    RMU,
    UNDIAL,
    WGA,
    GradAscent,
    GradDiff,
    IdkNLL,
    Objective,
    SatImp,
    SimNPO,
    UnlearnTrainer,
)
from efface.hf.model.lora import add_lora
from efface.objectives import known_objectives
from support.helpers import LONG, arguments, random_store, saved_llama, tiny_llama, written_rows
from support.padded_loop import exact_losses, padded_curve
from support.processes import RANKS, launch
from support.ranks.distributed_run import main as run_alone

# ---- several processes


def run(out: Path, processes: int, *what: str) -> list[dict[str, Any]]:
    """Return the record of each process."""
    out.mkdir()
    done = launch(processes, [str(RANKS / "distributed_run.py"), str(out), *what])
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]


def alone(out: Path, *what: str) -> dict[str, Any]:
    run_alone(out, *what)
    record: dict[str, Any] = json.loads((out / "rank0.json").read_text())
    return record


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run on one process with one forward pass per step, with which the others are compared."""
    record = alone(tmp_path_factory.mktemp("alone"), "npo", "cached", "4096")
    assert len(record["losses"]) == 24
    assert abs(record["losses"][-1] - record["losses"][0]) > 0.05 * record["losses"][0]
    return record


@pytest.mark.slow
@pytest.mark.parametrize(("reference", "token_budget"), [("cached", "4096"), ("live", "40")])
def test_two_processes_follow_the_run_on_one(
    reference: str, token_budget: str, single: dict[str, Any], tmp_path: Path
) -> None:
    """Losses and weights agree. A small budget gives several micro-batches, whose gradients are reduced once."""
    ranks = run(tmp_path / "two", 2, "npo", reference, token_budget)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(single["losses"], rel=1e-5)
        for name, weight in single["weights"].items():
            # Adam moved them by up to 0.024: 24 steps of 1e-3
            assert flat(rank["weights"][name]) == pytest.approx(flat(weight), rel=1e-4, abs=1e-4), name
    assert ranks[0]["weights"] == ranks[1]["weights"]
    for mine, theirs in zip(single["logs"], ranks[0]["logs"], strict=True):
        for name in ("loss", "forget_loss", "retain_loss", "grad_norm"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4), name


@pytest.mark.slow
def test_a_process_without_a_share_of_the_last_step_keeps_up(single: dict[str, Any], tmp_path: Path) -> None:
    """20 rows in steps of 6 leave 2 pairs, that is, 4 sequences, for 5 processes."""
    ranks = run(tmp_path / "five", 5, "npo", "cached", "4096")
    assert ranks[4]["losses"] == pytest.approx(single["losses"], rel=1e-5)


@pytest.mark.slow
def test_other_objectives_follow_the_run_on_one(tmp_path: Path) -> None:
    """Pairs, live distributions, logits, activations. 7 rows in steps of 3 leave one of 3 processes without a share."""
    expected, three = alone(tmp_path, "others"), run(tmp_path / "three", 3, "others")[2]
    for objective, record in expected.items():
        for mine, theirs in zip(record["logs"], three[objective]["logs"], strict=True):
            for name in {"loss", "forget_loss", "retain_loss", "retain_preference", "mean_log_ratio"} & mine.keys():
                assert theirs[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-4), (objective, name)
        for name, weight in record["weights"].items():
            got = three[objective]["weights"][name]
            # Adam moved them by 0.006
            assert flat(got) == pytest.approx(flat(weight), rel=1e-4, abs=2e-4), (objective, name)


@pytest.mark.slow
def test_the_command_on_two_processes_writes_one_model(tmp_path: Path) -> None:
    saved_llama(tmp_path / "model")
    data, out = written_rows(tmp_path / "rows.json"), tmp_path / "out"
    words = ["unlearn", "--model", str(tmp_path / "model"), "--forget", str(data), "--retain", str(data)]
    words += ["--output_dir", str(out), "--use_cpu", "True", "--pairs_per_step", "2", "--num_train_epochs", "1"]
    words += ["--save_schedule", "2", "--ddp_timeout", "120"]
    version = launch(2, ["-m", "efface", "--version"])  # as users start it, without seconds of imports
    assert version.stdout.splitlines() == [f"efface {efface.__version__}"] * 2, version.stderr[-4000:]
    done = launch(2, [str(RANKS / "command_rank.py"), *words])
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("wrote ") == 1
    assert done.stderr.count(": 3 steps\n") == 1
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() > 0
    assert not list(out.glob(".partial-*"))
    again = launch(2, [str(RANKS / "command_rank.py"), *words])
    assert again.returncode != 0
    assert "contains a finished run" in again.stderr, again.stderr[-4000:]

    # As if the run was killed after step 2: both ranks continue from there, to the same bits.
    whole = (out / "model.safetensors").read_bytes()
    assert {path.name for path in (out / "checkpoint-2").glob("*_1.*")} == {"rng_state_1.pth", "progress_1.pt"}
    (out / "model.safetensors").unlink()
    shutil.rmtree(out / "checkpoint-3")
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "finished": False}))
    done = launch(2, [str(RANKS / "command_rank.py"), *words])
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count(f"continuing from {out / 'checkpoint-2'}") == 1
    assert (out / "model.safetensors").read_bytes() == whole


def flat(values: Any) -> list[float]:
    return [x for value in values for x in flat(value)] if isinstance(values, list) else [values]


# ---- torch.compile: the same numbers, and no new graph for every length


def losses_of(folder: Path, *, compiled: bool, lora: bool, reference: str) -> tuple[list[float], list[int]]:
    """Run steps with varying numbers of tokens and sequences; return the losses and the number of graphs after each
    step.
    """
    graphs: list[int] = []

    class Counted(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            graphs.append(counters["stats"]["unique_graphs"])

    settings: dict[str, Any] = {
        "max_steps": 12,
        "pairs_per_step": 6,
        "token_budget": 50,
        "lr_scheduler_type": "constant",
    }
    if compiled:
        # traces and breaks graphs like the default, without a C++ compiler
        settings |= {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    model = tiny_llama(num_hidden_layers=1)  # most of the time is tracing
    torch.manual_seed(3)
    trainer = UnlearnTrainer(
        add_lora(model, r=4, target=["q_proj", "down_proj"]) if lora else model,
        arguments(folder, **settings),
        forget=random_store(20, seed=1),
        retain=random_store(50, seed=2),
        objective=NPO(),
        reference=reference,
        callbacks=[Counted()],
    )
    losses = exact_losses(trainer)
    trainer.train()
    return losses, graphs


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler reads .grad
@pytest.mark.parametrize(("lora", "reference"), [(False, "cached"), (True, "adapter")])
def test_a_compiled_run_is_the_run_and_makes_no_graph_for_every_length(
    lora: bool, reference: str, tmp_path: Path
) -> None:
    expected, graphs = losses_of(tmp_path, compiled=False, lora=lora, reference=reference)
    assert graphs == [0] * 12
    got, graphs = losses_of(tmp_path, compiled=True, lora=lora, reference=reference)
    assert got == pytest.approx(expected, rel=1e-5)
    assert 0 < graphs[3] == graphs[11]  # after four steps the compiler knows which sizes vary


# ---- every objective, twenty steps: the trainer follows a padded eager loop; test_compat compares with open-unlearning


STEPS, LR = 20, 1e-3
OBJECTIVES: dict[str, Objective] = {
    "NPO": NPO(beta=0.1),
    "NPO, KL": NPO(beta=0.5, retain_loss_type="KL", alpha=2.0),
    "SimNPO": SimNPO(beta=0.3, delta=0.5),
    "SimNPO, KL": SimNPO(beta=0.3, retain_loss_type="KL"),
    "GradAscent": GradAscent(),
    "GradDiff": GradDiff(gamma=0.2),
    "GradDiff, KL": GradDiff(gamma=0.2, retain_loss_type="KL"),
    "DPO": DPO(beta=0.2),
    "IdkNLL": IdkNLL(),
    "WGA": WGA(beta=0.5),
    "SatImp": SatImp(beta1=0.5, beta2=1.0, gamma=1.0),
    "CEU": CEU(gamma=1.0, alpha=0.5),
    "UNDIAL": UNDIAL(beta=3.0),
    "UNDIAL, KL": UNDIAL(beta=3.0, alpha=0.1, retain_loss_type="KL"),
    "PDU": PDU(retain_loss_eps=4.0, dual_step_size=0.2, dual_warmup_epochs=1),
    "RMU": RMU(module_regex=r"model\.layers\.1"),
    "RMU, NLL": RMU(module_regex=r"model\.layers\.0", retain_loss_type="NLL"),
}


def test_every_objective_of_efface_has_a_case() -> None:
    """Other tests of the process can have registered classes of their own."""
    names = {name for name, cls in known_objectives().items() if cls.__module__.startswith("efface.")}
    assert {objective.name for objective in OBJECTIVES.values()} == names


def data() -> dict[str, Any]:
    return {
        "forget": random_store(20, seed=1),
        "retain": random_store(50, seed=2),
        "alternate": random_store(20, seed=3),
    }


def kinds(objective: Objective, *, lora: bool) -> list[str]:
    """Return the references that an objective can have."""
    if not objective.needs_reference and not objective.needs_reference_model():
        return ["auto"]
    return ["live", *(["adapter"] if lora else []), *([] if objective.needs_reference_model() else ["cached"])]


def cases() -> Iterator[Any]:
    """Yield objectives with each reference; LoRA with other references than its own only for a few in short runs."""
    for (name, objective), lora in itertools.product(OBJECTIVES.items(), (False, True)):
        for kind in kinds(objective, lora=lora):
            again = lora and kind != "adapter" and name not in ("NPO", "NPO, KL", "DPO", "SimNPO", "PDU", "RMU, NLL")
            marks = LONG if again else ()
            yield pytest.param(name, lora, kind, marks=marks, id=f"{name}-{'LoRA' if lora else 'full'}-{kind}")


def made(*, lora: bool, **changes: Any) -> Any:
    """Return a tiny Llama; for LoRA, new adapters on large weights, because with small frozen weights it hardly
    changes.
    """
    if not lora:
        return tiny_llama(**changes)
    pytest.importorskip("peft", reason="needs peft: pip install 'efface[lora]'")
    torch.manual_seed(3)
    return add_lora(tiny_llama(initializer_range=0.2, **changes), r=4)


def check_weights(ours: Any, theirs: Any) -> None:
    """Assert that weights agree. Adam moved them by up to 0.02 (LoRA: 0.1)."""
    for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (weight - other).abs().max() < 2e-4, name


def follow(got: list[float], want: list[float], *, rel: float = 1e-4) -> None:
    assert len(got) == len(want)
    size = max(map(abs, want))
    assert max(want) - min(want) > 5 * rel * size  # the curve must move for the comparison to mean anything
    assert got == pytest.approx(want, rel=rel, abs=rel * size)


def step_losses(trainer: UnlearnTrainer) -> list[float]:
    losses: list[float] = []
    step = trainer.training_step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.training_step = recorded  # type: ignore[method-assign]
    return losses


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "max_steps": STEPS,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "seed": 0,
        **changes,
    }


@functools.cache
def by_the_padded_loop(name: str, *, lora: bool) -> tuple[list[float], Any]:
    """Return the losses and the model; the loop's frozen model is every kind of reference."""
    model = made(lora=lora)
    losses = padded_curve(OBJECTIVES[name], model, **data(), steps=STEPS, lr=5e-3 if lora else LR)
    return losses, model


@pytest.mark.parametrize(("name", "lora", "reference"), cases())
def test_twenty_steps_follow_the_padded_loop(name: str, lora: bool, reference: str, tmp_path: Path) -> None:
    objective, stores, model = OBJECTIVES[name], data(), made(lora=lora)
    lr = 5e-3 if lora else LR
    trainer = UnlearnTrainer(
        model,
        arguments(tmp_path, token_budget=100, **settings(learning_rate=lr)),  # several micro-batches per step
        objective=objective,
        reference=reference,
        **stores,
    )
    ours = step_losses(trainer)
    trainer.train()
    expected, twin = by_the_padded_loop(name, lora=lora)
    if isinstance(objective, CEU):  # ours omits the target's entropy, which has no gradient; compare the weights only
        expected = ours
    follow(ours, expected)
    check_weights(model, twin)
