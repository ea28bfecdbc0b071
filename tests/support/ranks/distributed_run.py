"""One rank of a training run, started by torchrun; writes its exact losses as JSON."""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from efface import NPO, UnlearnTrainer
from support.helpers import arguments, leave_no_thread, random_store, tiny_llama


def main(out: Path, reference: str, token_budget: int) -> None:
    model = tiny_llama()
    trainer = UnlearnTrainer(
        model,
        arguments(
            out / "run",
            pairs_per_step=6,
            token_budget=token_budget,
            num_train_epochs=6,
            lr_scheduler_type="constant",
            logging_steps=4,
            max_grad_norm=1.0,
        ),
        forget=random_store(20, seed=1),
        retain=random_store(50, seed=2),
        objective=NPO(alpha=1.0),
        reference=reference,
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
    record = {
        "losses": losses,
        "logs": [log for log in trainer.state.log_history if "loss" in log],
        "weights": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
    }
    (out / f"rank{trainer.args.process_index}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    leave_no_thread()
