"""torch.compile around the packed model: the same numbers, and no new graph for every length."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from efface import NPO, UnlearnTrainer
from efface.hf.model.lora import add_lora
from support.helpers import arguments, random_store, tiny_llama
from support.padded_loop import exact_losses


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Any:
    # transformers tells accelerate through the environment, which the next test must not find
    for name in ("BACKEND", "MODE"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def run(folder: Path, *, compiled: bool, steps: int, lora: bool = False, reference: str = "cached") -> list[float]:
    """A run with another number of tokens and of sequences in nearly every forward pass."""
    settings: dict[str, Any] = {
        "max_steps": steps,
        "pairs_per_step": 6,
        "token_budget": 50,
        "lr_scheduler_type": "constant",
    }
    if compiled:
        # traces and cuts graphs as the default does, and needs no C++ compiler
        settings |= {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    torch.manual_seed(3)
    trainer = UnlearnTrainer(
        add_lora(tiny_llama(), r=4) if lora else tiny_llama(),
        arguments(folder, **settings),
        forget=random_store(20, seed=1),
        retain=random_store(50, seed=2),
        objective=NPO(),
        reference=reference,
    )
    losses = exact_losses(trainer)
    trainer.train()
    return losses


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own looking
@pytest.mark.parametrize(("lora", "reference"), [(False, "cached"), (True, "adapter")])
def test_a_compiled_run_is_the_run_and_makes_no_graph_for_every_length(
    lora: bool, reference: str, tmp_path: Path
) -> None:
    expected = run(tmp_path, compiled=False, steps=12, lora=lora, reference=reference)
    assert not counters["stats"]["unique_graphs"]
    graphs = []
    for steps in (4, 12):
        torch._dynamo.reset()
        counters.clear()
        got = run(tmp_path, compiled=True, steps=steps, lora=lora, reference=reference)
        assert got == pytest.approx(expected[: len(got)], rel=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] <= graphs[0]
