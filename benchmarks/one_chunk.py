"""One chunk against several, for shapes where the loss chooses one: ``python -m benchmarks.one_chunk N D V [ROUNDS]``.

NPO in bf16 with a trained head on the CPU, forward and backward, interleaved. The result is the median over rounds of
the ratio within a round.
"""

import argparse

import torch

from benchmarks.harness.timing import interleaved, median_ratio
from benchmarks.loss.inputs import LossInputs, LossShape, make_inputs
from efface_kernels import ReferenceRows, default_chunk_rows, linear_sequence_loss


def _run(inputs: LossInputs, *, live: bool, chunk_rows: int | None) -> None:
    assert inputs.rule is not None
    loss = linear_sequence_loss(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        inputs.row_offsets,
        inputs.rule,
        reference=ReferenceRows(inputs.reference_hidden, inputs.reference_head) if live else None,
        reference_sums=None if live else inputs.reference_sums,
        chunk_rows=chunk_rows,
    ).loss
    torch.autograd.grad(loss, inputs.wanted)


def main(n: int, d: int, v: int, rounds: int = 7) -> None:
    inputs = make_inputs(LossShape(n, d, v, torch.bfloat16))
    rows = default_chunk_rows("cpu", v, 2)
    print(f"N {n}, D {d}, V {v}; chunks of {rows} rows; torch {torch.__version__}")
    for live in (True, False):
        calls = {
            chunk_rows: lambda _, live=live, chunk_rows=chunk_rows: _run(inputs, live=live, chunk_rows=chunk_rows)
            for chunk_rows in (None, rows)
        }
        times = interleaved(calls, rounds, warm_up=1)
        ratio = median_ratio(times[None], times[rows])
        print(
            f"{'live' if live else 'cached'}: the loss's choice takes {ratio:.2f} x the time of several chunks",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one_chunk", description=__doc__)
    for name, said in (("n", "label rows"), ("d", "hidden size"), ("v", "vocabulary")):
        parser.add_argument(name, type=int, help=said)
    parser.add_argument("rounds", type=int, nargs="?", default=7)
    torch.set_num_threads(2)
    main(**vars(parser.parse_args()))
