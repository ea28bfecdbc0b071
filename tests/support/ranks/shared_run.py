"""Training runs whose sequences begin with the same tokens, with and without shared prefixes.

As a script, one rank of several runs with shared prefixes, started by torchrun:
``shared_run.py <folder> <steps> <name of a case>..`` writes the record of each run as JSON.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from efface import DPO, NPO, PDU, RMU, UNDIAL, Objective, SimNPO, UnlearnTrainer
from efface.batching import TokenStore
from efface.hf.model.lora import add_lora
from support.helpers import VOCABULARY, arguments, leave_no_thread, tiny_llama

PREFIX = 30
"""Tokens with which every sequence begins; SmolLM2's template has 24, Llama-3's with a system prompt 44."""

# ---- data

Row = tuple[list[int], list[int]]  # prompt, answer


def chat_rows(rows: int, *, seed: int, prefix: int = PREFIX, low: int = 3) -> list[Row]:
    """Return rows of random tokens. The prompts begin with the same ``prefix`` tokens, whatever the seed, and have
    ``low`` to ``low`` + 4 tokens after them.
    """
    rng = np.random.default_rng(seed)
    begin = np.random.default_rng(0).integers(3, VOCABULARY, prefix).tolist()
    sizes = rng.integers([low, 4], [low + 5, 14], (rows, 2))
    parts = [[rng.integers(3, VOCABULARY, size).tolist() for size in row] for row in sizes]
    return [(begin + question, answer) for question, answer in parts]


def stored(rows: list[Row]) -> TokenStore:
    """Return the rows as a store whose labels are the answers."""
    return TokenStore.from_sequences([prompt + answer for prompt, answer in rows], [len(prompt) for prompt, _ in rows])


def chat_stores(prefix: int = PREFIX) -> dict[str, TokenStore]:
    """Return 20 forget rows, 50 retain rows, and another answer to each forget question."""
    forget, retain, others = (chat_rows(rows, seed=seed, prefix=prefix) for rows, seed in ((20, 1), (50, 2), (20, 3)))
    alternate = [(prompt, answer) for (prompt, _), (_, answer) in zip(forget, others, strict=True)]
    return {"forget": stored(forget), "retain": stored(retain), "alternate": stored(alternate)}


# ---- runs


@dataclass(frozen=True)
class Case:
    """A training run: its objective, its reference, and settings that differ from those of the other runs."""

    objective: Objective
    reference: str = "auto"
    lora: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def model(self) -> Any:
        """Return a tiny Llama; for LoRA, new adapters on large weights: on small ones they would hardly change it."""
        if not self.lora:
            return tiny_llama()
        model = tiny_llama(initializer_range=0.2)
        torch.manual_seed(3)
        return add_lora(model, r=4)


_NPO, _DPO, _KL = NPO(beta=0.1), DPO(beta=0.2), NPO(beta=0.5, retain_loss_type="KL", alpha=2.0)
_SIMNPO, _UNDIAL = SimNPO(beta=0.3, delta=0.5), UNDIAL(beta=3.0, alpha=0.5)
_PDU = PDU(retain_loss_eps=4.0, dual_step_size=0.2, dual_warmup_epochs=1)
_RMU = RMU(module_regex=r"model\.layers\.0")
_ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
CASES = {
    "NPO, live": Case(_NPO, "live"),
    "NPO, cached": Case(_NPO, "cached"),
    "NPO, live, checkpointing": Case(_NPO, "live", settings={"gradient_checkpointing": True}),
    "NPO, cached, accumulation": Case(_NPO, "cached", settings=_ACCUMULATED),
    "NPO, one pass a step": Case(_NPO, "live", settings={"token_budget": 4096}),
    "SimNPO": Case(_SIMNPO),
    "DPO, live": Case(_DPO, "live"),
    "DPO, cached": Case(_DPO, "cached"),
    "NPO and KL": Case(_KL, "live"),
    "UNDIAL": Case(_UNDIAL),
    "PDU": Case(_PDU),
    "RMU": Case(_RMU),
    "LoRA, NPO, adapter": Case(_NPO, "adapter", lora=True),
    "LoRA, NPO, cached": Case(_NPO, "cached", lora=True),
    "LoRA, NPO, adapter, checkpointing": Case(_NPO, "adapter", lora=True, settings={"gradient_checkpointing": True}),
    "LoRA, SimNPO": Case(_SIMNPO, lora=True),
    "LoRA, DPO, adapter": Case(_DPO, "adapter", lora=True),
    "LoRA, NPO and KL, adapter": Case(_KL, "adapter", lora=True),
    "LoRA, UNDIAL, adapter": Case(_UNDIAL, "adapter", lora=True),
    "LoRA, PDU": Case(_PDU, lora=True),
    "LoRA, RMU, adapter": Case(_RMU, "adapter", lora=True),
}


def trainer_of(folder: Path, case: Case, *, share: bool, **settings: Any) -> UnlearnTrainer:
    """Return the trainer of a run on one process or more, in steps of 4 pairs and several forward passes."""
    settings = {
        "share_prefixes": share,
        "token_budget": 128,
        "pairs_per_step": None if "gradient_accumulation_steps" in case.settings else 4,
        "learning_rate": 5e-3 if case.lora else 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "logging_steps": 10,
        **case.settings,
        **settings,
    }
    return UnlearnTrainer(
        case.model(), arguments(folder, **settings), objective=case.objective, reference=case.reference, **chat_stores()
    )


def recorded(trainer: UnlearnTrainer) -> dict[str, Any]:
    """Train; return the unrounded losses of all steps, the logged figures, and the trained weights."""
    losses: list[float] = []
    step: Callable[..., Tensor] = trainer.training_step

    def noted(wrapped: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        share = step(wrapped, *args, **kwargs)
        total = share.detach().clone()
        if trainer.args.world_size > 1:
            torch.distributed.all_reduce(total)
        losses.append(total.item() / trainer.args.world_size)
        return share

    trainer.training_step = noted  # type: ignore[method-assign]
    trainer.train()
    return {
        "losses": losses,
        "logs": [log for log in trainer.state.log_history if "loss" in log],
        "weights": {
            name: weight.flatten().tolist() for name, weight in trainer.model.named_parameters() if weight.requires_grad
        },
    }


def main(out: Path, steps: int, *names: str) -> None:
    rank, records = 0, {}
    for name in names:
        trainer = trainer_of(out / "run", CASES[name], share=True, max_steps=steps)
        rank, records[name] = trainer.args.process_index, recorded(trainer)
    (out / f"rank{rank}.json").write_text(json.dumps(records))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
    leave_no_thread()
