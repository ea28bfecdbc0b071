"""One rank of training runs, started by torchrun or alone. It writes losses and weights as JSON.

``distributed_run.py <folder> npo <reference> <token budget>``, or ``<folder> others`` for several objectives in turn.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from efface import DPO, NPO, PDU, RMU, UNDIAL, UnlearnTrainer
from support.helpers import arguments, leave_no_thread, random_store, tiny_llama

OTHERS = {
    "dpo-kl": DPO(beta=0.2, retain_loss_type="KL"),
    "undial": UNDIAL(beta=3.0, alpha=0.5),
    "pdu": PDU(retain_loss_eps=4.0, dual_step_size=0.2, dual_warmup_epochs=0),
    "rmu": RMU(module_regex=r"model\.layers\.0"),
}


def run(out: Path, forget: int, retain: int, settings: dict[str, Any], **options: Any) -> tuple[int, dict[str, Any]]:
    """Return the rank, and a record of its exact losses, its log and its weights."""
    settings = {"lr_scheduler_type": "constant", "max_grad_norm": 1.0, **settings}
    trainer = UnlearnTrainer(
        tiny_llama(),
        arguments(out / "run", **settings),
        forget=random_store(forget, seed=1),
        retain=random_store(retain, seed=2),
        **options,
    )
    losses: list[float] = []
    step = trainer.training_step

    def recorded(wrapped: nn.Module, *args, **kwargs):  # type: ignore[no-untyped-def]
        share = step(wrapped, *args, **kwargs)
        total = share.detach().clone()
        if trainer.args.world_size > 1:
            torch.distributed.all_reduce(total)
        losses.append(total.item() / trainer.args.world_size)
        return share

    trainer.training_step = recorded  # type: ignore[method-assign]
    trainer.train()
    return trainer.args.process_index, {
        "losses": losses,
        "logs": [log for log in trainer.state.log_history if "loss" in log],
        "weights": {name: tensor.tolist() for name, tensor in trainer.model.state_dict().items()},
    }


def main(out: Path, what: str, reference: str = "", token_budget: str = "") -> None:
    if what == "npo":
        settings = {"pairs_per_step": 6, "token_budget": int(token_budget), "num_train_epochs": 6, "logging_steps": 4}
        rank, record = run(out, 20, 50, settings, objective=NPO(alpha=1.0), reference=reference)
    else:
        settings, alternate = {"pairs_per_step": 3, "num_train_epochs": 2}, random_store(7, seed=3)
        record = {}
        for name, objective in OTHERS.items():
            rank, record[name] = run(out, 7, 20, settings, alternate=alternate, objective=objective)
    (out / f"rank{rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    leave_no_thread()
