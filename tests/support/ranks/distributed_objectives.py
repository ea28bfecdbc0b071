"""One rank that trains with several objectives in turn, started by torchrun; writes losses and weights as JSON."""

import json
import sys
from pathlib import Path

import torch

from efface import DPO, PDU, RMU, UNDIAL, UnlearnTrainer
from support.helpers import arguments, leave_no_thread, random_store, tiny_llama

OBJECTIVES = {
    "dpo-kl": DPO(beta=0.2, retain_loss_type="KL"),
    "undial": UNDIAL(beta=3.0, alpha=0.5),
    "pdu": PDU(retain_loss_eps=4.0, dual_step_size=0.2, dual_warmup_epochs=0),
    "rmu": RMU(module_regex=r"model\.layers\.0"),
}


def main(out: Path) -> None:
    records = {}
    for name, objective in OBJECTIVES.items():
        model = tiny_llama()
        settings = {"pairs_per_step": 3, "num_train_epochs": 2, "lr_scheduler_type": "constant", "max_grad_norm": 1.0}
        trainer = UnlearnTrainer(
            model,
            arguments(out / "run", **settings),
            forget=random_store(7, seed=1),
            retain=random_store(20, seed=2),
            alternate=random_store(7, seed=3),
            objective=objective,
        )
        trainer.train()
        records[name] = {
            "logs": [log for log in trainer.state.log_history if "loss" in log],
            "weights": {key: tensor.tolist() for key, tensor in model.state_dict().items()},
        }
    (out / f"rank{trainer.args.process_index}.json").write_text(json.dumps(records))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    leave_no_thread()
