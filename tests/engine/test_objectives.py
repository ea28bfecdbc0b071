"""Objectives: names, defaults, parameters, and one of the user's own."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from efface import DPO, NPO, GradAscent, GradDiff, Objective, SimNPO, get_objective, register_objective
from efface.batching import Role, StepTotals
from efface.objectives import StepTerms, known_objectives, registry
from efface.objectives.custom import FunctionObjective
from efface_kernels import Sequences


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
    with pytest.raises(ValueError, match="'graddiff': has parameters alpha, gamma, retain_loss_type, got beta"):
        get_objective("graddiff", beta=1.0)


@pytest.mark.parametrize("cls", [NPO, SimNPO])
def test_beta_must_be_positive(cls: type) -> None:
    with pytest.raises(ValueError, match="`beta`: expected a positive number, got 0"):
        cls(beta=0)


def test_npo_says_that_it_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="give a live or cached reference"):
        NPO().forget_terms(Sequences(torch.zeros(2), torch.tensor([0, 2])))


def test_a_step_mixes_roles_with_means_over_the_whole_step() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    sequences = Sequences(logprobs, torch.tensor([0, 1, 4]), first=0)
    totals = StepTotals(forget_sequences=5, forget_tokens=10, retain_sequences=5, retain_tokens=20)
    roles = torch.tensor([Role.FORGET, Role.RETAIN], dtype=torch.int8)
    terms = StepTerms(GradDiff(gamma=3.0, alpha=2.0), roles, totals)(sequences)
    torch.testing.assert_close(terms, torch.tensor([3.0 * -1 / 10, 2.0 * 9 / 20]))


def test_a_rule_needs_no_reference_where_nothing_is_forgotten_and_no_more_than_is_declared() -> None:
    class Doubled(NPO):
        def forget_terms(self, sequences: Sequences) -> Tensor:
            return 2 * super().forget_terms(sequences)

    roles = torch.tensor([Role.RETAIN], dtype=torch.int8)
    idle = StepTerms(DPO(), roles, StepTotals()).rule(forgets=False)
    assert idle is not None
    assert not idle.needs_reference
    assert not idle.pairs
    assert StepTerms(NPO(), roles, StepTotals()).rule(forgets=True) is not None
    # whose declared term would be that of NPO
    assert StepTerms(Doubled(), roles, StepTotals()).rule(forgets=True) is None
    assert StepTerms(FunctionObjective(function=lambda s: s.sums), roles, StepTotals()).rule(forgets=True) is None


def test_ten_lines_make_an_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_OBJECTIVES", dict(known_objectives()))

    @register_objective
    @dataclass(frozen=True, kw_only=True)
    class Hinge(Objective):
        """Push L/n below a margin, and no further."""

        margin: float = 3.0
        name: ClassVar[str] = "hinge"

        def forget_terms(self, sequences: Sequences) -> Tensor:
            return (sequences.sums / sequences.lengths + self.margin).clamp(min=0)

    assert get_objective("hinge", margin=2.0).forget_terms(
        Sequences(torch.tensor([-1.0, -5.0]), torch.tensor([0, 1, 2]))
    ).tolist() == [1.0, 0.0]

    class Impostor(Hinge):
        name: ClassVar[str] = "npo"

    with pytest.raises(ValueError, match="'npo': already registered"):
        register_objective(Impostor)
