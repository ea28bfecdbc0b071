"""Tests of objectives: names, defaults, parameters, and user-defined objectives."""

import math
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import efface
from efface import (
    CEU,
    DPO,
    NPO,
    PDU,
    RMU,
    UNDIAL,
    WGA,
    FinetuneTrainer,
    FunctionObjective,
    GradAscent,
    GradDiff,
    Objective,
    SatImp,
    SimNPO,
    UnlearnTrainer,
    get_objective,
    register_objective,
)
from efface.batching import Role, StepTotals
from efface.hf.reference.make import reference_kind
from efface.objectives import base, check_term, known_objectives, step_terms
from efface_kernels import Kind, SequenceRule, Sequences, Term
from support.helpers import arguments, random_store, tiny_llama


def test_defaults_are_those_of_open_unlearning() -> None:
    assert NPO() == NPO(beta=0.1, alpha=1.0, gamma=1.0)
    assert SimNPO() == SimNPO(beta=4.5, delta=0.0, gamma=0.125, alpha=1.0)
    assert GradDiff() == GradDiff(gamma=1.0, alpha=1.0)
    assert GradAscent().alpha == 0


def test_by_name() -> None:
    assert get_objective("npo", beta=0.3) == NPO(beta=0.3)
    assert get_objective("SimNPO") == SimNPO()
    assert get_objective("GradAscent") == get_objective("grad_ascent") == GradAscent()
    with pytest.raises(ValueError, match=r"expected one of ceu, dpo, grad_ascent, .*, wga, got 'forgetful'"):
        get_objective("forgetful")
    with pytest.raises(
        ValueError, match=r"'graddiff': expected parameters from \(alpha, gamma, retain_loss_type\), got beta"
    ):
        get_objective("graddiff", beta=1.0)


@pytest.mark.parametrize("cls", [NPO, SimNPO])
def test_beta_must_be_positive(cls: type) -> None:
    with pytest.raises(ValueError, match="`beta`: expected a positive number, got 0"):
        cls(beta=0)


def test_npo_says_that_it_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="pass a live or cached reference"):
        of_npo(Sequences(torch.zeros(2), torch.tensor([0, 2])))


def test_a_step_mixes_roles_with_means_over_the_whole_step() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    sequences = Sequences(logprobs, torch.tensor([0, 1, 4]), first=0)
    totals = StepTotals(forget_sequences=5, forget_tokens=10, retain_sequences=5, retain_tokens=20)
    roles = torch.tensor([Role.FORGET, Role.RETAIN], dtype=torch.int8)
    terms = step_terms(GradDiff(gamma=3.0, alpha=2.0), roles, totals)(sequences)
    torch.testing.assert_close(terms, torch.tensor([3.0 * -1 / 10, 2.0 * 9 / 20]))


def test_a_rule_needs_no_reference_where_nothing_is_forgotten_and_no_more_than_is_declared() -> None:
    roles = torch.tensor([Role.RETAIN], dtype=torch.int8)
    idle = step_terms(DPO(), roles, StepTotals(), forgets=False)
    assert isinstance(idle, SequenceRule)
    assert not idle.needs_reference
    assert not idle.pairs
    assert isinstance(step_terms(NPO(), roles, StepTotals()), SequenceRule)
    function = FunctionObjective(function=lambda s: s.sums)
    assert not isinstance(step_terms(function, roles, StepTotals()), SequenceRule)
    assert isinstance(step_terms(function, roles, StepTotals(), forgets=False), SequenceRule)


def test_a_function_under_a_declared_term_is_refused() -> None:
    """The declared term would be used, and the function would never be called."""
    with pytest.raises(TypeError, match="Doubled: defines forget_terms, but inherits `term` from NPO, which"):

        class Doubled(NPO):
            def forget_terms(self, sequences: Sequences) -> Tensor:
                return 2 * sequences.sums

    class Own:
        def forget_terms(self, sequences: Sequences) -> Tensor:
            return 2 * sequences.sums

    with pytest.raises(TypeError, match="Mixed: defines forget_terms, but inherits `term` from DPO"):

        class Mixed(Own, DPO):  # type: ignore[misc]
            pass

    class Chosen(Own, NPO):  # type: ignore[misc]
        def term(self) -> Any:
            return self.forget_terms

    assert Chosen().term()(Sequences(torch.ones(2), torch.tensor([0, 2]))) == 4
    with pytest.raises(TypeError, match="Nothing: defines no forget_terms; built-in objectives define `term`"):
        type("Nothing", (Objective,), {})().term()(Sequences(torch.ones(2), torch.tensor([0, 2])))


def objective_of(kind: Kind, **attributes: Any) -> Objective:
    def term(self: Objective) -> Term:
        return Term(kind)

    made: Objective = type("Mine", (Objective,), {"term": term, "name": "mine", **attributes})()
    return made


@pytest.mark.parametrize(
    ("kind", "attributes", "message"),
    [
        (Kind.NPO, {}, "Mine: its term, NPO, reads reference log-probabilities; set `needs_reference = True`"),
        (Kind.DPO, {"needs_reference": True}, "Mine: `forget_data`: expected 'both' for its term, DPO, got 'answer'"),
        (Kind.DPO, {"forget_data": "both"}, "Mine: its term, DPO, reads reference log-probabilities"),
        (Kind.SIMNPO, {"forget_data": "both"}, "Mine: `forget_data`: expected 'answer' or 'alternate' for its term"),
        (Kind.NONE, {}, "Mine: expected a term for forget sequences, got NONE, which has no loss"),
        (Kind.ALTERNATE, {}, "Mine: expected a term for forget sequences, got ALTERNATE"),
    ],
)
def test_a_term_that_the_class_does_not_fit_is_refused_before_anything_runs(
    kind: Kind, attributes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        UnlearnTrainer(
            tiny_llama(),
            arguments(tmp_path),
            forget=random_store(2, seed=1),
            retain=random_store(2, seed=2),
            objective=objective_of(kind, **attributes),
        )


@pytest.mark.parametrize("cls", known_objectives().values(), ids=lambda cls: cls.name)
def test_our_own_classes_fit_their_terms_and_want_finite_weights(cls: type[Objective]) -> None:
    check_term(cls())
    for name in ("gamma", "alpha"):
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match=f"`{name}`: expected a finite number, got {value}"):
                cls(**{name: value})


@pytest.mark.parametrize("cls", known_objectives().values(), ids=lambda cls: cls.name)
@pytest.mark.parametrize("value", ["1", [1], None])
def test_parameters_of_other_types_are_named(cls: type[Objective], value: Any) -> None:
    """Values of wrong types from YAML or Python: the error names the expected type."""
    for name in (field.name for field in fields(cls) if field.type in (float, "float")):
        with pytest.raises(TypeError, match=f"`{name}`: expected a number, got {re.escape(repr(value))}"):
            cls(**{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (NPO, "beta"), (DPO, "beta"), (SimNPO, "beta"), (SimNPO, "delta"), (WGA, "beta"), (SatImp, "beta1"),
        (SatImp, "beta2"), (CEU, "ignore_first_n_answer_tokens"), (UNDIAL, "beta"),
    ],
)  # fmt: skip
def test_parameters_are_finite(cls: Any, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{name}`: expected .* number, got {value}"):
        cls(**{name: value})


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda s: s.sums.mean(), ValueError, r"expected one loss term for each of \d+ sequences, got shape \(\)"),
        (lambda s: s.sums[:1], ValueError, r"expected one loss term for each of \d+ sequences, got shape \(1,\)"),
        (lambda s: s.logprobs, ValueError, r"expected one loss term for each of \d+ sequences, got shape"),
        (lambda s: 1.0, TypeError, "the term function: expected a tensor of loss terms, got float"),
    ],
)
def test_a_function_gives_a_term_for_each_sequence(
    function: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    trainer = UnlearnTrainer(
        tiny_llama(),
        arguments(tmp_path, max_steps=1),
        forget=random_store(4, seed=1),
        retain=random_store(4, seed=2),
        objective=function,
    )
    with pytest.raises(error, match=message):
        trainer.train()


def test_the_weight_of_a_declared_term_counts() -> None:
    class Twice(NPO):
        def term(self) -> Term:
            return Term(Kind.NPO, weight=2.0, beta=self.beta)

    sequences = Sequences(torch.tensor([-1.0]), torch.tensor([0, 1]), 0, torch.tensor([-2.0]))
    roles = torch.tensor([Role.FORGET], dtype=torch.int8)
    one, two = (step_terms(each, roles, StepTotals(forget_sequences=3))(sequences) for each in (NPO(), Twice()))
    assert two == 2 * one


README = Path(efface.__file__).parent / "objectives" / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def run(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "readme"}
    sys.modules["readme"] = ModuleType("readme")  # dataclasses look up names there
    exec(compile(block, "README.md", "exec", dont_inherit=True), names)
    return names


def test_a_function_is_an_objective(tmp_path: Path) -> None:
    names = run(BLOCKS[0])
    two = Sequences(torch.tensor([-1.0, -5.0]), torch.tensor([0, 1, 2]))
    assert names["objective"].forget_terms(two).tolist() == [2.0, 0.0]
    losses = []
    for objective in (names["objective"], names["hinge"], FunctionObjective(function=of_npo, reads_reference=True)):
        trainer = UnlearnTrainer(
            tiny_llama(),
            arguments(tmp_path, num_train_epochs=4),
            forget=random_store(8, seed=1),
            retain=random_store(8, seed=2),
            objective=objective,
        )
        trainer.train()
        losses.append([log["forget_loss"] for log in trainer.state.log_history if "forget_loss" in log])
    assert losses[2][0] == pytest.approx(2 / 0.1 * math.log(2), rel=1e-4)
    assert losses[2][-1] < losses[2][0]


def test_what_a_function_makes_of_other_rows_has_no_gradient() -> None:
    """Retain sequences have no reference, so L / L_ref is infinite for them, and its gradient 0 * inf."""
    objective = FunctionObjective(function=lambda s: -(s.sums / s.reference_sums).square(), reads_reference=True)
    roles = torch.tensor([Role.FORGET, Role.RETAIN], dtype=torch.int8)
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    sequences = Sequences(logprobs, torch.tensor([0, 1, 3]), 0, torch.tensor([-2.0, 0.0]))
    step_terms(objective, roles, StepTotals(forget_sequences=1, retain_tokens=2))(sequences).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0.5, -0.5, -0.5]


def of_npo(sequences: Sequences) -> Tensor:
    return SequenceRule.of(torch.zeros(len(sequences), dtype=torch.int8), {0: NPO(beta=0.1).term()})(sequences)


def test_ten_lines_make_an_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base._OBJECTIVES, "_classes", known_objectives())
    names = run(BLOCKS[1])
    assert len(BLOCKS[1].strip().splitlines()) <= 18
    Hinge = names["Hinge"]
    assert names["objective"] == Hinge(margin=2.0)
    assert get_objective("hinge", margin=2.0).forget_terms(
        Sequences(torch.tensor([-1.0, -5.0]), torch.tensor([0, 1, 2]))
    ).tolist() == [1.0, 0.0]

    class Impostor(Hinge):  # type: ignore[misc, valid-type]
        name: ClassVar[str] = "npo"

    with pytest.raises(ValueError, match="'npo': already registered"):
        register_objective(Impostor)


def test_a_declared_objective_is_a_rule() -> None:
    objective = run(BLOCKS[2])["objective"]
    roles, logprobs = torch.zeros(1, dtype=torch.int8), torch.tensor([-1.0, -2.0])
    rule = step_terms(objective, roles, StepTotals(forget_tokens=2))
    assert isinstance(rule, SequenceRule)
    expected = sum(each * (1 - math.exp(each)) ** 2 for each in logprobs.tolist()) / 2
    assert rule(Sequences(logprobs, torch.tensor([0, 2]))).item() == pytest.approx(expected)


@pytest.mark.parametrize("objective", known_objectives().values(), ids=lambda o: o.name)
def test_every_objective_is_in_the_table(objective: type[Objective]) -> None:
    assert f"`{objective.name}`" in README.read_text(encoding="utf-8")


def test_more_defaults_of_open_unlearning() -> None:
    assert DPO() == DPO(beta=0.1, alpha=1.0, gamma=1.0)
    assert WGA() == WGA(beta=1.0, alpha=1.0, gamma=1.0)
    assert SatImp() == SatImp(beta1=5.0, beta2=1.0, gamma=0.1, alpha=1.0)
    assert UNDIAL() == UNDIAL(beta=10.0, alpha=0.0, gamma=1.0)
    assert CEU() == CEU(ignore_first_n_answer_tokens=1, alpha=0.0)
    assert PDU() == PDU(dual_step_size=1.0, dual_warmup_epochs=5, dual_update_upon="step", gamma=1.0, alpha=1.0)
    assert RMU() == RMU(steering_coeff=2, module_regex=r"model\.layers\.7", retain_loss_type="EMBED_DIFF")


@pytest.mark.parametrize(
    ("cls", "parameters", "message"),
    [
        (NPO, {"retain_loss_type": "nll"}, "`retain_loss_type`: expected one of 'NLL', 'KL', got 'nll'"),
        (PDU, {"retain_loss_type": "KL"}, "expected one of 'NLL', got 'KL'"),
        (PDU, {"dual_update_upon": "batch"}, "`dual_update_upon`: expected one of 'step', 'epoch'"),
        (UNDIAL, {"beta": 0}, "`beta`: expected a positive number"),
        (WGA, {"beta": -1}, "`beta`: expected 0 or a positive number"),
        (SatImp, {"beta2": -1}, "`beta2`: expected 0 or a positive number"),
        (CEU, {"ignore_first_n_answer_tokens": -1}, "`ignore_first_n_answer_tokens`: expected 0 or"),
    ],
)
def test_parameters_out_of_range_are_refused(cls: Any, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**parameters)


def test_objectives_that_need_a_model_say_so() -> None:
    with pytest.raises(TypeError, match="UNDIAL: its forget loss is computed from logits, so it has no term"):
        UNDIAL().term()
    for objective in (UNDIAL(), NPO(retain_loss_type="KL"), RMU()):
        assert objective.needs_reference_model()
        with pytest.raises(ValueError, match="got 'cached', which has only log-probabilities"):
            reference_kind("cached", objective, tiny_llama())
    assert not RMU(alpha=0.0).needs_reference_model()
    assert reference_kind("auto", SimNPO(retain_loss_type="KL"), tiny_llama()) == "live"
    assert reference_kind("auto", NPO(), tiny_llama()) == "cached"
    assert reference_kind("auto", GradDiff(), tiny_llama()) is None


def test_rmu_trains_the_selected_parameters(tmp_path: Path) -> None:
    model = tiny_llama()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    UnlearnTrainer(
        model,
        arguments(tmp_path),
        forget=random_store(8, seed=1),
        retain=random_store(8, seed=2),
        objective=RMU(module_regex=r"model\.layers\.1", trainable_params_regex=(r".*layers\.0\.mlp\..*",)),
    ).train()
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed
    assert all("layers.0.mlp" in name for name in changed)
    for settings, message in (
        ({"module_regex": r"model\.layers\.9"}, r"expected 'model\\.layers\\.9' to match the name of one module"),
        ({"module_regex": r"model\.layers\.1", "trainable_params_regex": ("nothing",)}, "`trainable_params_regex`"),
    ):
        with pytest.raises(ValueError, match=re.escape(message) if "match" in message else message):
            UnlearnTrainer(
                tiny_llama(),
                arguments(tmp_path),
                forget=random_store(3),
                retain=random_store(3),
                objective=RMU(**settings),
            )


@pytest.mark.parametrize("upon", ["step", "epoch"])
@pytest.mark.parametrize("save", [{"save_steps": 3}, {"save_steps": 2}, {"save_strategy": "epoch"}], ids=str)
def test_the_dual_variable_ascends_and_is_resumed(upon: str, save: dict[str, Any], tmp_path: Path) -> None:
    """Resumed in the middle of an epoch, and at its last step, before and after the end of the epoch."""
    objective = PDU(alpha=1.0, retain_loss_eps=4.0, dual_step_size=0.5, dual_update_upon=upon, dual_warmup_epochs=1)

    def trainer(**changes: Any) -> UnlearnTrainer:
        return UnlearnTrainer(
            tiny_llama(),
            arguments(tmp_path, num_train_epochs=3, **changes),
            forget=random_store(8, seed=1),
            retain=random_store(8, seed=2),
            objective=objective,
        )

    whole = trainer(**{"save_strategy": "steps", **save})
    whole.train()
    weights = [log["retain_preference"] for log in whole.state.log_history if "retain_preference" in log]
    assert weights[:2] == [1.0, 1.0]  # the warm-up: an epoch of two steps
    assert weights[-1] > 1.1
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{save.get('save_steps', 2)}"))
    assert resumed.objective == whole.objective
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_pdu_reads_the_retain_set_before_it_weighs_anything(tmp_path: Path) -> None:
    store = random_store(8, seed=1)
    objective = PDU(alpha=0.0, dual_warmup_epochs=0)
    with pytest.raises(ValueError, match="`retain`: expected a retain set"):
        UnlearnTrainer(tiny_llama(), arguments(tmp_path), forget=store, retain=None, objective=objective)
    trainer = UnlearnTrainer(tiny_llama(), arguments(tmp_path), forget=store, retain=store, objective=objective)
    trainer.train()
    assert trainer.objective is not None
    assert trainer.objective.alpha > 1


def test_compat_is_refused_where_it_has_no_effect(tmp_path: Path) -> None:
    store = random_store(4)
    with pytest.raises(ValueError, match="`compat`: expected None for fine-tuning"):
        FinetuneTrainer(tiny_llama(), arguments(tmp_path, compat="open-unlearning"), data=store)
    with pytest.raises(ValueError, match="expected 'open-unlearning' or None, got 'tofu'"):
        UnlearnTrainer(tiny_llama(), arguments(tmp_path, compat="tofu"), forget=store, retain=store, objective=NPO())
