"""Generates README's blocks, docs/benchmarks.md and the plots from benchmarks/results/*.json alone."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import expected
from benchmarks.publish import plots, tables
from benchmarks.publish.tables import Result, newest

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"(<!-- benchmarks:([\w: -]+?) -->\n).*?(\n<!-- end -->)", flags=re.DOTALL)


def _link(result: Result) -> str:
    return f"[figures](benchmarks/results/{result.file})"


def _rounds(result: Result) -> int:
    return len(result.rows[0]["rounds_ms"]) if "rounds_ms" in result.rows[0] else result.rows[0]["rounds"]


def _step(result: Result) -> str:
    shape = result.rows[0]["shape"]
    rows = [row for row in result.rows if row["shape"] == shape]
    said = f"{shape}: `{result.machine['command']}`, one interleaved run of {_rounds(result)} rounds ({_link(result)}):"
    return f"{said}\n\n{tables.step_table(rows)}"


def _loss(result: Result) -> str:
    """Show only the first shape; docs/benchmarks.md has all of them."""
    rows = next(iter(tables.grouped(result.rows, "shape").values()))
    cells = [[tables.name_of(row, rows), f"{row['median_ms']:.0f}", f"{row['against_floor']:.2f}"] for row in rows]
    table = tables.markdown(["loss, forward and backward", "median ms", "x the bare GEMMs"], cells)
    return f"NPO at the head, {rows[0]['shape']}, one interleaved run ({_link(result)}):\n\n{table}"


def _pack(result: Result) -> str:
    cells = []
    for (task,), rows in tables.grouped(result.rows, "task").items():
        ours = rows[0]["median_ms"]
        said = f"{ours:.3g} ms" if ours >= 1 else f"{ours * 1e3:.3g} µs"
        by_hand = next(row for row in rows if row["provider"] == "NumPy and Python")
        cells.append([task, said, f"{by_hand['against_efface']:.0f}"])
    table = tables.markdown(["task", "efface", "times faster than NumPy and Python"], cells)
    return f"`{result.machine['command']}` ({_link(result)}):\n\n{table}"


def _evaluate(result: Result) -> str:
    """Show only the first shape of each part."""
    said = f"`{result.machine['command']}` ({_link(result)})"
    likelihood, generation = (result.record.get(part, []) for part in ("likelihood", "generation"))
    parts = []
    if likelihood:
        shape = likelihood[0]["shape"]
        table = tables.likelihood_table([row for row in likelihood if row["shape"] == shape])
        parts.append(f"All {likelihood[0]['answers']} answers of {likelihood[0]['data']}, {shape}:\n\n{table}")
    if generation:
        shape, questions = generation[0]["shape"], generation[0]["questions"]
        table = tables.generation_table([row for row in generation if row["shape"] == shape])
        parts.append(f"{questions} questions answered, {shape}:\n\n{table}")
    return "\n\n".join([f"{said}, one interleaved run for each table.", *parts])


BLOCKS: Mapping[str, Callable[[Result], str]] = {
    "evaluate": _evaluate,
    "loss": _loss,
    "pack": _pack,
    "step": _step,
}


def filled(text: str, found: Sequence[Result]) -> str:
    """Return the text with everything between ``<!-- benchmarks:SUITE -->`` and ``<!-- end -->`` regenerated.

    ``SUITE gpu`` uses results from a GPU, ``SUITE`` those from a CPU.

    Raises:
        ValueError: a block names no known suite, or a suite without results.
    """

    def block(match: re.Match[str]) -> str:
        suite, _, device = match[2].partition(" ")
        result = newest(list(found), suite, gpu=device == "gpu")
        if suite not in BLOCKS or result is None:
            raise ValueError(
                f"`<!-- benchmarks:{match[2]} -->`: expected a suite with results, one of {sorted(BLOCKS)}"
            )
        return f"{match[1]}{BLOCKS[suite](result)}{match[3]}"

    return _BLOCK.sub(block, text)


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
    """Write README's blocks, docs/benchmarks.md and the plots."""
    found = tables.read(root / "benchmarks" / "results")
    drawn = plots.draw(found, root / "benchmarks" / "results" / "plots")
    readme = root / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8"), found), encoding="utf-8")
    (root / "docs" / "benchmarks.md").write_text(page(found, drawn), encoding="utf-8")
