"""Two processes, started by torchrun, one of which fails in a batch. Each writes the error that it received.

With "middle" or "end" as second argument, writing to the row store fails instead: after the first of two turns, or
after the last.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from efface.evaluate import RowResult, run_tasks
from efface.evaluate.runner import RowStore
from efface.processes import processes
from support.helpers import leave_no_thread, tiny_llama


class Failing:
    def __init__(self) -> None:
        self.name = "failing"
        self.keys = [b"0", b"1", b"2", b"3"]
        self.batches = [np.array([row]) for row in range(4)]

    def run(self, model: Any, rows: Any) -> list[RowResult]:
        assert not isinstance(model, nn.parallel.DistributedDataParallel)
        if rows[0] == 3 and len(sys.argv) == 2:
            raise ValueError("row 3 is too long")
        return [{"row": int(rows[0])}]


if __name__ == "__main__":
    out, state = Path(sys.argv[1]), processes()
    puts = []

    def put(*_: Any) -> None:
        puts.append(1)
        if len(puts) == (1 if sys.argv[2] == "middle" else 4):
            raise OSError("no space left")

    if len(sys.argv) > 2:
        RowStore.put = put  # type: ignore[method-assign]
    try:
        run_tasks(nn.parallel.DistributedDataParallel(tiny_llama()), [Failing()], store=out / "rows.sqlite")
    except (ValueError, OSError) as error:
        (out / f"rank{state.process_index}.txt").write_text(str(error))
    leave_no_thread()
