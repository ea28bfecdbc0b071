"""Tests of ``compat``: every method on every kind of batch, whole runs, step counts, and documented differences."""

import copy
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from efface import CEU, DPO, NPO, PDU, RMU, FunctionObjective, Objective, UnlearnTrainer, get_objective
from efface.batching import TokenStore, plan_epoch
from efface.cli.main import main
from efface.hf.model.head import fuse
from efface.hf.model.lora import add_lora
from efface.hf.reference.live import LiveReference
from efface.hf.train.dataset import Accumulation
from efface.hf.train.open_unlearning import DUAL_EPOCHS, Padded, PaddedPairs, decayed_parameters, padded_loss
from support import open_unlearning_loop as theirs
from support.helpers import (
    LONG,
    TEXTS,
    arguments,
    random_store,
    saved_llama,
    tiny_llama,
    tiny_model,
    tiny_tokenizer,
    written_rows,
)

VOCABULARY, PAD, END = 130, 0, 2
LAYER = r"model\.layers\.1"


def made_rows(
    seed: int, count: int, low: int, high: int, *, start: int | None = None, change: Callable[[list[int], int], None]
) -> list[theirs.Row]:
    """Return rows of random tokens ≥ 3 that end in END. The answer is the second half, or begins at ``start``."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(low, high))]
        at = len(ids) // 2 if start is None else start % len(ids)
        ids[-1] = END
        change(ids, at)
        rows.append((ids, at))
    return rows


def nothing(ids: list[int], at: int) -> None:
    """Leave the row unchanged."""


def end_in_the_prompt(ids: list[int], at: int) -> None:
    ids[at - 1] = END


def padding_inside(ids: list[int], at: int) -> None:
    ids[1] = ids[at] = PAD


def batch(
    count: int, low: int, high: int, *, pad: int = PAD, **options: Any
) -> tuple[dict[str, list[theirs.Row]], int]:
    options.setdefault("change", nothing)
    roles = enumerate(("forget", "retain", "alternate"))
    return {role: made_rows(seed, count, low, high, **options) for seed, role in roles}, pad


BATCHES = {
    "equal lengths": batch(4, 12, 12),
    "ragged": batch(4, 5, 30),
    "one-token answers": batch(4, 6, 14, start=-1),
    "a batch of one": batch(1, 9, 20),
    "the end in the prompt": batch(3, 8, 20, change=end_in_the_prompt),
    "padded with the end": batch(4, 6, 18, change=end_in_the_prompt, pad=END),
    "padding inside": batch(4, 6, 18, change=padding_inside),
    "labels from the first token": batch(3, 5, 12, start=0),
    "long answers": batch(2, 20, 40, start=2),
}

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "NPO": ("NPO", {"beta": 0.1}),
    "NPO, KL": ("NPO", {"beta": 0.5, "retain_loss_type": "KL", "alpha": 2.0, "gamma": 0.7}),
    "DPO": ("DPO", {"beta": 0.2}),
    "DPO, KL": ("DPO", {"beta": 0.3, "retain_loss_type": "KL", "alpha": 0.5}),
    "SimNPO": ("SimNPO", {"beta": 4.5, "delta": 0.2, "gamma": 0.125}),
    "SimNPO, KL": ("SimNPO", {"beta": 2.5, "delta": 0.0, "gamma": 0.125, "retain_loss_type": "KL"}),
    "GradAscent": ("GradAscent", {}),
    "GradDiff": ("GradDiff", {"gamma": 0.3}),
    "GradDiff, KL": ("GradDiff", {"alpha": 2.0, "retain_loss_type": "KL"}),
    "IdkNLL": ("IdkNLL", {}),
    "UNDIAL": ("UNDIAL", {"beta": 10.0, "alpha": 0.0}),
    "UNDIAL, retain": ("UNDIAL", {"beta": 3.0, "alpha": 0.5}),
    "UNDIAL, KL": ("UNDIAL", {"beta": 3.0, "alpha": 0.1, "retain_loss_type": "KL"}),
    "CEU": ("CEU", {"ignore_first_n_answer_tokens": 1}),
    "CEU, all": ("CEU", {"ignore_first_n_answer_tokens": 0}),
    "WGA": ("WGA", {"beta": 0.7}),
    "WGA, KL": ("WGA", {"beta": 1.0, "retain_loss_type": "KL"}),
    "SatImp": ("SatImp", {"beta1": 5.0, "beta2": 1.0, "gamma": 0.1}),
    "SatImp, KL": ("SatImp", {"beta1": 0.5, "beta2": 0.3, "gamma": 1.0, "retain_loss_type": "KL"}),
    "PDU": ("PDU", {"retain_loss_eps": 0.3, "primal_dual": True, "gamma": 0.5, "alpha": 2.0}),
    "PDU, fixed": ("PDU", {"retain_loss_eps": 0.3, "primal_dual": False}),
    "RMU": ("RMU", {"module_regex": LAYER, "steering_coeff": 2.0, "retain_loss_type": "EMBED_DIFF"}),
    "RMU, NLL": ("RMU", {"module_regex": r"model\.layers\.0", "steering_coeff": 20.0, "retain_loss_type": "NLL"}),
    "RMU, KL": ("RMU", {"module_regex": LAYER, "steering_coeff": 20.0, "retain_loss_type": "KL", "gamma": 0.5}),
}
NAMES = {"GradAscent": "grad_ascent", "IdkNLL": "idk_nll"}


def ours(method: str, **changes: Any) -> Objective:
    name, settings = METHODS[method]
    return get_objective(NAMES.get(name, name.lower()), **{**settings, **changes})


def stored(rows: Sequence[theirs.Row]) -> TokenStore:
    return TokenStore.from_sequences([ids for ids, _ in rows], [start for _, start in rows])


def llama(seed: int = 0) -> Any:
    return tiny_llama(seed=seed, vocab_size=VOCABULARY, initializer_range=0.3)


# ---- losses ----


def cases() -> Iterator[Any]:
    """Yield each method on each kind of batch. Most that differ only in the retain term run only with EFFACE_LONG=1."""
    for method, kind in itertools.product(METHODS, BATCHES):
        again = method.endswith(", KL") and method != "NPO, KL" and kind != "ragged"
        yield pytest.param(method, kind, marks=LONG if again else (), id=f"{method}-{kind}")


@pytest.mark.parametrize(("method", "kind"), cases())
def test_loss_and_gradients_are_those_of_open_unlearning(method: str, kind: str) -> None:
    (rows, pad), objective = BATCHES[kind], ours(method)
    frozen, model = llama(), llama()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.02)
    twin = copy.deepcopy(model)
    inputs = {role: theirs.collate(own, pad) for role, own in rows.items()}
    expected = theirs.Method(*METHODS[method]).loss(twin, copy.deepcopy(frozen).eval(), inputs)
    expected.backward()  # type: ignore[no-untyped-call]
    fuse(model)
    parts = {role: Padded.of(stored(own), range(len(own)), pad) for role, own in rows.items()}
    forget = parts["alternate"] if method == "IdkNLL" else parts["forget"]
    pairs = PaddedPairs(forget, parts["retain"], parts["alternate"] if method.startswith("DPO") else None)
    if not objective.reads_retain():
        pairs = PaddedPairs(forget, None)
    loss = padded_loss(objective, model, LiveReference(frozen, torch.device("cpu")), pairs).loss
    loss.backward()
    if (method, kind) == ("CEU", "one-token answers"):  # no label token remains
        assert loss.isnan()
        assert expected.isnan()
        return
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    for (name, weight), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if other.grad is None:
            assert weight.grad is None or not weight.grad.any(), name
        else:
            error = (weight.grad - other.grad).norm()
            assert error <= 1e-5 * other.grad.norm() + 1e-7, name


def test_rmu_divides_every_sum_by_every_count() -> None:
    """Sums 6 and 2 with counts 3 and 1 give 6/3, 6/1, 2/3 and 2/1, not just 6/3 and 2/1."""
    activations = torch.tensor([[[0.0], [2.0], [1.0], [1.0]], [[0.0], [0.0], [0.0], [2.0**0.5]]], requires_grad=True)
    labels = torch.tensor([[-100, 5, 5, 5], [-100, -100, -100, 5]])
    loss = theirs.activation_loss(activations, torch.zeros_like(activations), labels != -100)
    assert loss.item() == pytest.approx((2 + 6 + 2 / 3 + 2) / 4)


# ---- steps ----

# rows, micro-batch, accumulation, settings, and the micro-batches of each step, recorded from transformers 4.45.1
STEPS: dict[str, tuple[int, int, int, dict[str, Any], str]] = {
    "it divides": (32, 4, 4, {"epochs": 2}, "0-3 4-7 8-11 12-15"),
    "left over": (40, 4, 4, {"epochs": 3}, "0-3 4-7 8-11 12-15 16-19 20-23"),
    "left over, a short one": (41, 4, 4, {"epochs": 3}, "0-3 4-7 8-11 12-15 16-19 20-23"),
    "left over, dropped": (41, 4, 4, {"epochs": 3, "drop_last": True}, "0-3 4-7 8-11 12-15 16-19 20-23"),
    "part of an epoch": (20, 3, 2, {"epochs": 2.5}, "0-1 2-3 4-5 6-7 8-9 10-11 12-13 14-15"),
    "max_steps": (20, 3, 2, {"max_steps": 11}, "0-1 2-3 4-5 6-7 8-9 10-11 12-13 14-15 16-17 18-19 20-21"),
    "a step an epoch": (16, 4, 4, {"epochs": 2}, "0-3 4-7"),
    "less than a step": (10, 4, 4, {"epochs": 7}, "0-2 3-3 4-5 6-7 8-8 9-11 12-14"),
    "less than a step, max_steps": (10, 4, 4, {"max_steps": 6}, "0-2 3-3 4-5 6-7 8-8 9-11"),
    "more than half a step": (20, 4, 8, {"epochs": 10}, "0-4 5-7 8-9 10-14 15-15 16-19 20-23 24-24 25-29 30-31"),
    "one micro-batch": (3, 4, 4, {"epochs": 4}, "0-0 1-1 2-2 3-3"),
    "no accumulation": (40, 8, 1, {"epochs": 1.05}, "0-0 1-1 2-2 3-3 4-4 5-5"),
    "single rows": (7, 1, 5, {"epochs": 4}, "0-4 5-9 10-14 15-19"),
    "TOFU's forget10": (400, 8, 4, {"epochs": 10}, " ".join(f"{i}-{i + 3}" for i in range(0, 480, 4))),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_have_the_micro_batches_of_open_unlearning(name: str) -> None:
    rows, size, accumulate, settings, expected = STEPS[name]
    drop_last = settings.get("drop_last", False)
    accumulation = Accumulation.of(rows, size, accumulate, drop_last=drop_last)
    assert accumulation.batches == (rows // size if drop_last else -(-rows // size))
    run = theirs.loop(
        accumulation.batches, accumulate, **{key: value for key, value in settings.items() if key != "drop_last"}
    )
    assert " ".join(f"{step[0]}-{step[-1]}" for step in run.steps) == expected
    assert run.max_steps == settings.get("max_steps", -int(-settings.get("epochs", 0) * accumulation.steps // 1))
    borders = [accumulation.read(step) for step in range(len(run.steps) + 1)]
    assert [list(range(*pair)) for pair in itertools.pairwise(borders)] == run.steps
    for epoch, state in enumerate(run.epochs_at_end[:-1]):
        assert accumulation.epochs_at_border((epoch + 1) * accumulation.batches) == state
        assert accumulation.epochs_at_border((epoch + 2) * accumulation.batches - 1) == state
    assert accumulation.epochs_at_border(accumulation.batches - 1) < 0


def test_an_epoch_without_a_micro_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="`dataloader_drop_last`: expected at least 4 pairs"):
        Accumulation.of(3, 4, 2, drop_last=True)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"warmup_epochs": 1.0, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}, 6),  # 200 / 32
        ({"warmup_epochs": 2.0, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}, 12),
        ({"warmup_epochs": 0.1, "pairs_per_step": 32}, 0),  # open-unlearning's warm-up can have no step
        ({"warmup_epochs": 1.0, "pairs_per_step": 400}, 0),
        ({"warmup_epochs": 0.0}, 0),
        ({"warmup_steps": 3}, 3),
    ],
    ids=str,
)
def test_warm_up_is_that_of_open_unlearning(settings: dict[str, Any], steps: int, tmp_path: Path) -> None:
    trainer = UnlearnTrainer(
        tiny_llama(),
        arguments(tmp_path, compat="open-unlearning", **settings),
        forget=random_store(200, seed=1),
        retain=None,
        objective=NPO(alpha=0.0),
    )
    assert trainer.args.get_warmup_steps(1000) == steps


# ---- runs ----

S = theirs.Schedule
PART = (r"model\.layers\.(0|1)\.mlp\.down_proj\.weight",)
PRIMAL = {"retain_loss_eps": 3.0, "primal_dual": True, "dual_step_size": 0.3}
RUNS: dict[str, tuple[str, dict[str, Any], int, theirs.Schedule]] = {
    "NPO": ("NPO", {}, 41, S(4, 4)),
    "NPO, KL": ("NPO, KL", {}, 20, S(3, 2, warmup_epochs=1.0)),
    "DPO": ("DPO", {}, 26, S(4, 4, warmup_epochs=1.0)),
    "IdkNLL": ("IdkNLL", {}, 10, S(4, 2)),
    "SimNPO": ("SimNPO", {"gamma": 1.0}, 10, S(4, 4, epochs=6)),
    "GradAscent": ("GradAscent", {}, 11, S(3, 2, epochs=1.5)),
    "UNDIAL": ("UNDIAL", {}, 30, S(4, 3)),
    "CEU": ("CEU", {}, 17, S(4, 2)),
    "WGA": ("WGA", {}, 33, S(5, 3, max_steps=7)),
    "SatImp": ("SatImp", {"beta1": 1.0, "gamma": 1.0}, 20, S(4, 8, epochs=5)),
    "PDU, each step": ("PDU", {**PRIMAL, "dual_update_upon": "step", "dual_warmup_epochs": 1}, 40, S(4, 4, epochs=4)),
    "PDU, at once": ("PDU", {**PRIMAL, "dual_update_upon": "step", "dual_warmup_epochs": 0}, 12, S(4, 2)),
    "PDU, each epoch": ("PDU", {**PRIMAL, "dual_update_upon": "epoch", "dual_warmup_epochs": 1}, 40, S(4, 4, epochs=4)),
    "RMU": ("RMU", {}, 41, S(4, 4)),
    "RMU, a part": ("RMU", {"trainable_params_regex": PART}, 21, S(4, 2, trainable=PART)),
}


def run_data(count: int) -> dict[str, list[theirs.Row]]:
    counts = {"forget": count, "retain": 50, "alternate": count}
    return {
        role: made_rows(seed, rows, 5, 24, change=nothing) for seed, (role, rows) in enumerate(counts.items(), start=7)
    }


def compat_trainer(
    folder: Path,
    model: Any,
    objective: Objective,
    rows: dict[str, list[theirs.Row]],
    schedule: theirs.Schedule,
    **more: Any,
) -> UnlearnTrainer:
    settings = {
        "per_device_train_batch_size": schedule.size,
        "gradient_accumulation_steps": schedule.accumulate,
        "num_train_epochs": schedule.epochs,
        "max_steps": schedule.max_steps,
        "learning_rate": schedule.lr,
        "weight_decay": schedule.decay,
        "max_grad_norm": schedule.clip,
        "warmup_epochs": schedule.warmup_epochs or None,
        "optim": "adamw_torch",
        "seed": 0,
        **more,
    }
    stores = {role: stored(own) for role, own in rows.items()}
    if objective.forget_data == "answer":
        del stores["alternate"]
    return UnlearnTrainer(model, arguments(folder, compat="open-unlearning", **settings), objective=objective, **stores)


@pytest.mark.parametrize("name", [*RUNS, "NPO, KL, LoRA"])
def test_a_run_ends_with_the_weights_of_open_unlearning(name: str, tmp_path: Path) -> None:
    """Both train on the pairs of efface's plan. LoRA with its base as reference exists only in efface."""
    lora = name.endswith(", LoRA")
    method, changes, count, schedule = RUNS[name.removesuffix(", LoRA")]
    if lora:
        pytest.importorskip("peft", reason="needs peft: pip install 'efface[lora]'")
    rows, model = run_data(count), add_lora(llama(), r=4) if lora else llama()
    if name == "RMU":  # here Adam amplifies fp32's rounding, which differs between CPUs
        model = model.double()
    schedule = replace(schedule, trainable=(r".*lora_.*",)) if lora else schedule
    before = {parameter: weight.detach().clone() for parameter, weight in model.named_parameters()}
    twin = copy.deepcopy(model)
    trainer = compat_trainer(tmp_path, model, ours(method, **changes), rows, schedule)
    trainer.train()

    lengths = [[len(ids) for ids, _ in rows[role]] for role in ("forget", "retain")]
    batches = -(-count // schedule.size)

    def pairs(epoch: int, step: int) -> tuple[list[int], list[int]]:
        plan = plan_epoch(*lengths, pairs_per_step=schedule.size, token_budget=4096, seed=0, epoch=epoch)
        forget, retain = plan.pairs(step)
        return forget.tolist(), retain.tolist()

    def taken(role: str, index: list[int]) -> theirs.Inputs:
        return theirs.collate([rows[role][i] for i in index], 0)

    def inputs(epoch: int, step: int) -> dict[str, theirs.Inputs]:
        forget, retain = pairs(epoch, step)
        return {
            "forget": taken("forget", forget),
            "alternate": taken("alternate", forget),
            "retain": taken("retain", retain),
        }

    def redrawn(epoch: int) -> list[theirs.Inputs]:
        return [taken("retain", pairs(DUAL_EPOCHS + epoch, step)[1]) for step in range(batches)]

    own_name, settings = METHODS[method]
    run = theirs.Method(own_name, {**settings, **changes})
    expected = theirs.train(run, twin, schedule, count, inputs, batches, redrawn)

    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert trainer.state.global_step == trainer.state.max_steps == len(expected.losses)
    assert [log["loss"] for log in logs] == pytest.approx(expected.losses, rel=1e-4, abs=2e-4)
    assert [log["grad_norm"] for log in logs] == pytest.approx(expected.norms, rel=1e-3)
    assert [log["learning_rate"] for log in logs] == pytest.approx(expected.rates, rel=1e-6)
    with torch.no_grad():
        for (parameter, weight), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            # In norm, not per element: where a gradient is almost zero, Adam turns rounding errors into whole steps.
            assert (weight - other).norm() <= 1e-3 * (weight - before[parameter]).norm(), parameter
    if isinstance(trainer.objective, PDU) and changes["dual_update_upon"] == "step":
        assert trainer.objective.alpha == pytest.approx(run.preferences[1], rel=1e-4)
        assert run.preferences[1] != 2.0
    if "part" in name:  # the other weights are unchanged, but their gradients count in the norm
        changed = {
            parameter for parameter, weight in model.named_parameters() if not torch.equal(weight, before[parameter])
        }
        assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
        assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("NPO", 2),  # the next step begins with the micro-batches left over from this epoch
        ("SimNPO", 1),  # steps of a short epoch
        ("PDU, each step", 5),
        ("PDU, each epoch", 5),  # the last step of an epoch, after which the dual variable ascends
        *(pytest.param(name, step, marks=LONG) for name in RUNS for step in range(1, 4)),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(name: str, step: int, tmp_path: Path) -> None:
    method, changes, count, schedule = RUNS[name]
    rows = run_data(count)

    def trainer(**settings: Any) -> UnlearnTrainer:
        return compat_trainer(tmp_path, llama(), ours(method, **changes), rows, schedule, **settings)

    whole = trainer(save_strategy="steps", save_steps=step)
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.objective == whole.objective
    assert resumed.state.global_step == whole.state.global_step
    for weight, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(weight, other)


# ---- the frozen model ----


@pytest.mark.parametrize(
    ("objective", "first"),
    [
        (NPO(beta=0.1), {"forget_loss": 20 * 0.6931471805599453}),
        (NPO(beta=0.1, retain_loss_type="KL"), {"forget_loss": 20 * 0.6931471805599453, "retain_loss": 0.0}),
        (DPO(beta=0.5), {"forget_loss": 4 * 0.6931471805599453}),
        (RMU(module_regex=LAYER), {"retain_loss": 0.0}),
    ],
    ids=["NPO", "NPO, KL", "DPO", "RMU"],
)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_the_frozen_model_computes_as_the_policy_does(
    objective: Objective, first: dict[str, float], weights: torch.dtype, tmp_path: Path
) -> None:
    """accelerate's prepare_model casts the reference like the policy (grad_diff.py:16-23)."""
    model = llama().to(weights)
    trainer = compat_trainer(tmp_path, model, objective, run_data(8), S(4, 2, max_steps=1), bf16=True)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    for name, value in first.items():
        assert log[name] == pytest.approx(value, abs=1e-5), name


# ---- documented differences ----


@pytest.mark.parametrize("count", [1, 3])
def test_refusals_are_drawn_again_whenever_a_row_is_read(count: int, tmp_path: Path) -> None:
    lines = ["I don't know.", "I cannot say.", "Nobody told me."]
    file = tmp_path / "idk.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    tokenizer = tiny_tokenizer()
    for objective in (DPO(), get_objective("idk_nll")):
        trainer = UnlearnTrainer(
            tiny_llama(vocab_size=300, max_position_embeddings=1024),
            arguments(tmp_path, compat="open-unlearning", refusal_file=str(file)),
            forget=TEXTS[:count],
            retain=TEXTS[3:],
            objective=objective,
            processing_class=tokenizer,
        )
        drawn: dict[str, list[str]] = {row["question"]: [] for row in TEXTS[:count]}
        steps: Any = trainer.get_train_dataloader().dataset
        assert len(steps) == 1
        for epoch in range(30):
            steps.begin_epoch(epoch)
            (pairs,) = steps[0].batches
            refused = pairs.alternate if objective.forget_data == "both" else pairs.forget
            for text in tokenizer.batch_decode(refused.input_ids):
                (question,) = [question for question in drawn if question in text]
                (line,) = [line for line in lines if line in text]
                drawn[question].append(line)
        assert all(len(refusals) == 30 and set(refusals) == set(lines) for refusals in drawn.values())
        assert len(set(map(tuple, drawn.values()))) == count
        steps.begin_epoch(7)
        assert torch.equal(steps[0].batches[0].retain.input_ids, steps[0].batches[0].retain.input_ids)
        trainer.train()


@pytest.mark.parametrize(
    ("config", "decayed"),
    [
        ("LlamaConfig", False),
        ("Qwen2Config", True),
        ("MistralConfig", True),
        ("Phi3Config", True),
        ("PhiConfig", False),
    ],
)
def test_norms_that_transformers_4_45_decays(config: str, decayed: bool) -> None:
    model = tiny_model(config)
    names = decayed_parameters(model)
    norms = [name for name, _ in model.named_parameters() if "norm" in name and "bias" not in name]
    assert norms
    assert all((name in names) == decayed for name in norms)
    assert not any("bias" in name for name in names)
    assert "model.layers.0.mlp.fc1.weight" in names or "model.layers.0.mlp.down_proj.weight" in names


def test_weight_decay_applies_to_the_same_parameters(tmp_path: Path) -> None:
    for compat, decayed in (("open-unlearning", True), (None, False)):
        trainer = UnlearnTrainer(
            tiny_model("Qwen2Config"),
            arguments(tmp_path, compat=compat, weight_decay=0.1),
            forget=random_store(4),
            retain=random_store(4),
            objective=NPO(),
        )
        optimizer: Any = trainer.create_optimizer()
        groups = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
        model: Any = trainer.model
        assert (groups[id(model.model.norm.weight)] > 0) == decayed


def test_an_epochs_end_is_that_of_the_steps_it_counts_as(tmp_path: Path) -> None:
    """open-unlearning saves after steps 2, 5 and 6. efface's second checkpoint is at step 4 instead."""
    assert theirs.loop(10, 4, epochs=3).epochs_at_end == [0.8, 2.0, 2.4]
    trainer = compat_trainer(tmp_path, llama(), NPO(), run_data(40), S(4, 4), save_strategy="epoch")
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]


def test_a_micro_batch_without_a_token_stops_the_run(tmp_path: Path) -> None:
    rows, _ = BATCHES["one-token answers"]
    trainer = compat_trainer(tmp_path, llama(), CEU(), rows, S(4, 1, epochs=1))
    with pytest.raises(FloatingPointError, match="not finite at step 1"):
        trainer.train()


class Mine(NPO):
    """Another loss under NPO's name."""


@pytest.mark.parametrize(
    ("settings", "objective", "message"),
    [
        ({}, Mine(), r"expected an objective of open-unlearning, got 'npo' \(Mine\)"),
        (
            {},
            FunctionObjective(function=lambda sequences: sequences.sums),
            r"expected an objective of open-unlearning, got 'function'",
        ),
        ({"compat": "tofu"}, NPO(), "expected 'open-unlearning' or None, got 'tofu'"),
        ({"pairs_per_step": 10}, NPO(), "expected `pairs_per_step` to be a multiple of .*=4, got 10; set"),
        ({"pairs_per_step": 2}, NPO(), "expected `pairs_per_step` to be a multiple of .*=4, got 2; set"),
    ],
)
def test_settings_that_open_unlearning_lacks_are_refused(
    settings: dict[str, Any], objective: Objective, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        UnlearnTrainer(
            tiny_llama(),
            arguments(tmp_path, **{"compat": "open-unlearning", **settings}),
            forget=random_store(4),
            retain=random_store(4),
            objective=objective,
        )


def test_a_dry_run_knows_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, forget = saved_llama(tmp_path / "llama"), written_rows(tmp_path / "forget.json", TEXTS * 8)
    words = ["unlearn", "--model", str(model), "--forget", str(forget), "--retain", str(forget), "--dry-run", "--json"]
    words += ["--objective", "npo", "--output_dir", str(tmp_path / "out"), "--num_train_epochs", "3", "--use_cpu"]
    words += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4"]
    for more, steps in (([], 9), (["--compat", "open-unlearning"], 6)):
        assert main([*words, *more]) == 0
        assert json.loads(capsys.readouterr().out)["run"]["steps"] == steps
