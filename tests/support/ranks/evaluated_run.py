"""One rank of a training run with evaluations, started by torchrun.

``python evaluated_run.py <folder> <output folder>``. The folder holds TOFU's files in ``tofu`` and a retain log in
``retain``. The rank writes the logged metrics and the batches that it computed itself.
"""

import json
import sys
from pathlib import Path
from typing import Any

from efface import NPO, UnlearnTrainer
from efface.evaluate import AnswerTask, TofuEvaluation
from efface.hf.train.callbacks import EvaluateCallback, KeepBest
from support.helpers import arguments, leave_no_thread
from support.tofu_helpers import model_of, read_rows, tokenizer_of


def main(folder: Path, out: Path) -> None:
    data = folder / "tofu"
    tokenizer = tokenizer_of(data)
    evaluate = TofuEvaluation(tokenizer, data, retain_log=folder / "retain" / "TOFU_EVAL.json", token_budget=1000)
    mine: list[list[int]] = []
    run = AnswerTask.run

    def noted(self: AnswerTask, model: Any, rows: Any) -> Any:
        mine.append(rows.tolist())
        return run(self, model, rows)

    AnswerTask.run = noted  # type: ignore[method-assign]
    trainer = UnlearnTrainer(
        model_of(tokenizer),
        arguments(out / "run", pairs_per_step=4, num_train_epochs=2, learning_rate=2e-3, seed=0),
        forget=read_rows(data, "forget"),
        retain=read_rows(data, "retain"),
        objective=NPO(),
        processing_class=tokenizer,
        callbacks=[EvaluateCallback(evaluate, on_start=True), KeepBest("forget_quality", ("model_utility", 0.0))],
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "forget_quality" in log]
    record = {"logs": logs, "batches": mine}
    (out / f"rank{trainer.args.process_index}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave_no_thread()
