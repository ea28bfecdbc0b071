"""Generates README's table, docs/benchmarks.md and the plots from benchmarks/results/*.json alone."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import expected
from benchmarks.publish import plots, tables
from benchmarks.publish.tables import Result, newest

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"(<!-- benchmarks:step -->\n).*?(\n<!-- end -->)", flags=re.DOTALL)


def step_block(result: Result) -> str:
    """Return README's table: the first shape of the step suite on plain rows, with the conditions of the run."""
    machine, plain = result.machine, tables.plain(result)
    shape = plain[0]["shape"]
    rows = [row for row in plain if row["shape"] == shape]
    cpu = f"a CPU ({machine['threads']} threads, {machine['processor']}); not measured on a GPU yet"
    return (
        f"{tables.step_table(rows)}\n\n"
        "live: the reference model runs in the step. cached: its log-probabilities are read from a file. rows: cross "
        "entropy over flattened rows. LoRA rows are compared with the first LoRA row. "
        f"NPO on TOFU's rows, {shape}. Measured on {machine.get('gpu') or cpu}. torch {machine['torch']}, "
        f"transformers {machine['rivals']['transformers']}, {machine['date']}: `{machine['command']}`, "
        f"{len(rows[0]['rounds_ms'])} interleaved rounds ([result file](benchmarks/results/{result.file}))."
    )


def filled(text: str, found: Sequence[Result]) -> str:
    """Return README's text with everything between ``<!-- benchmarks:step -->`` and ``<!-- end -->`` regenerated.

    The newest result of a GPU on rows without a chat template is shown; without one, the newest of a CPU.
    """
    usable = [each for each in found if each.suite == "step" and tables.plain(each)]
    result = newest(usable, "step", gpu=True) or newest(usable, "step", gpu=False)
    if result is None:
        raise ValueError("README.md: expected results of the step suite in benchmarks/results, got none")
    block = step_block(result)
    return _BLOCK.sub(lambda match: f"{match[1]}{block}{match[2]}", text)


_TOP = """# Benchmarks

`python -m benchmarks report` generates this page from `benchmarks/results/*.json`. The providers of a table are timed
interleaved in one run, and times are medians. On a GPU they are the times of the kernels; "wall ms" also includes the
launches from Python. "x floor" is the ratio to the time of the bare matrix products in the same rounds. Errors of
gradients are relative to fp64, errors of log-likelihoods relative to the padded loop in fp32.
A row is marked {faster} if its median is below efface's best for the same work."""
_TITLES = {
    "evaluate": "Evaluation",
    "loss": "Loss at the head",
    "pack": "Planning and packing",
    "start": "Start-up",
    "step": "Training step",
}


_EXPECTED = """**Computed, not measured**, by `python -m benchmarks expected`, in milliseconds. The loss's GEMMs run at
one assumed rate, and everything else moves bytes at another, without overlap. "x GEMMs" is the ratio of the sum to the
GEMMs alone. "launches" counts the kernels of a forward and a backward call, including GEMMs."""


def page(found: Sequence[Result], drawn: Mapping[str, Sequence[str]]) -> str:
    """Return docs/benchmarks.md: conditions, plots and tables of every results file; times expected on a GPU."""
    parts = [_TOP.format(faster=tables.FASTER)]
    if not any(result.on_gpu for result in found):
        parts.append(
            "There are no results from a GPU yet. `python -m benchmarks.gpu` measures them; see "
            "benchmarks/gpu/README.md."
        )
    for result in found:
        title = _TITLES[result.suite]
        device = result.machine.get("gpu") or "CPU"
        parts.append(f"## {title}, {device}, {result.machine['date']} ({result.file})\n\n{result.described}")
        parts += [f"![{name}](../benchmarks/results/plots/{name})" for name in drawn.get(result.file, ())]
        parts.append(tables.table(result))
    parts += [f"## Expected on a GPU\n\n{_EXPECTED}\n{expected.assumptions()}"]
    parts.append(tables.markdown(expected.HEADINGS, expected.table()))
    return "\n\n".join(parts) + "\n"


def everything(root: Path = ROOT) -> None:
    """Write README's table, docs/benchmarks.md and the plots."""
    found = tables.read(root / "benchmarks" / "results")
    drawn = plots.draw(found, root / "benchmarks" / "results" / "plots")
    readme = root / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8"), found), encoding="utf-8")
    (root / "docs" / "benchmarks.md").write_text(page(found, drawn), encoding="utf-8")
