"""Markdown tables of results; every figure is the JSON's. Rows where a rival is faster stay in, and are marked."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.publish.results import Result

Rows = Sequence[dict[str, Any]]
FASTER = "**faster than efface**"


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; its first column holds names, the others figures."""
    lines = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def grouped(rows: Rows, *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Return the rows by the values of keys, in their order."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups


def is_ours(row: dict[str, Any]) -> bool:
    """Whether the row is efface's."""
    return str(row["provider"]).startswith("efface")


def _work(row: dict[str, Any]) -> tuple[Any, ...]:
    """What two rows must have in common to be compared."""
    return row.get("training"), row.get("reference"), row.get("task"), row.get("mode")


def beaten(row: dict[str, Any], rows: Rows) -> bool:
    """Whether a rival's median is below that of efface's best for the same work; the bare GEMMs are no rival."""
    if is_ours(row) or row["provider"].startswith("bare") or row.get("median_ms") is None:
        return False
    own = [each["median_ms"] for each in rows if is_ours(each) and _work(each) == _work(row) and each.get("median_ms")]
    return bool(own) and row["median_ms"] < min(own)


def _name(row: dict[str, Any], rows: Rows) -> str:
    return f"{row['provider']}{', ' + FASTER if beaten(row, rows) else ''}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def loss(result: Result) -> str:
    """A table a shape."""
    parts = []
    for (shape,), rows in grouped(result.rows, "shape").items():
        first = rows[0]
        wall = any(row.get("wall_ms") is not None for row in rows)
        size = f"{first['objective']}, N {first['n']}, D {first['d']}, V {first['v']}, {first['dtype']}"
        headings = [
            "provider",
            "GEMMs",
            "median ms",
            *(["wall ms"] if wall else []),
            "quartiles",
            "x floor",
            "% of floor",
            "error dh",
            "error dW",
            "GiB",
        ]
        cells = [_loss_cells(row, rows, wall=wall) for row in rows]
        parts.append(f"### {shape}: {size}, {first['state']}, {first['rounds']} rounds\n\n{markdown(headings, cells)}")
    if "row_pass_ms" in result.record:
        passes = [[name, f"{ms:.3g}"] for name, ms in result.record["row_pass_ms"].items()]
        parts.append("### The row pass alone, (1024, 32000) bf16\n\n" + markdown(["pass", "median ms"], passes))
    missing = result.record.get("not_measured", [])
    if missing:
        parts.append("### Not measured\n\n" + "\n".join(f"- {reason}" for reason in missing))
    return "\n\n".join(parts)


def _loss_cells(row: dict[str, Any], rows: Rows, *, wall: bool) -> list[str]:
    return [
        _name(row, rows),
        str(row["gemms"]),
        f"{row['median_ms']:.4g}",
        *([_number(row.get("wall_ms"), ".4g")] if wall else []),
        f"{row['quarter_ms']:.4g} .. {row['three_quarters_ms']:.4g}",
        f"{row['against_floor']:.2f}",
        f"{row['of_floor_percent']:.0f}",
        _number(row["errors"].get("dh"), ".1e"),
        _number(row["errors"].get("dw"), ".1e"),
        _number(row.get("peak_gib"), ".2f"),
    ]


def step(result: Result) -> str:
    """A table a shape."""
    parts = []
    for (shape,), rows in grouped(result.rows, "shape").items():
        parts.append(f"### {shape}\n\n{step_table(rows)}")
    return "\n\n".join(parts)


def step_table(rows: Rows) -> str:
    """One shape: time, how many times faster than the eager step, tokens per second, memory."""
    memory = any(row.get("peak_gib") is not None for row in rows)
    headings = [
        "forward and backward",
        "median ms",
        "times faster, median of rounds",
        "tokens/s, with AdamW",
        *(["peak GiB"] if memory else []),
    ]
    cells = []
    for row in rows:
        if row.get("median_ms") is None:
            cells.append([row["provider"], row.get("problem") or "", *[""] * (len(headings) - 2)])
            continue
        figures = [f"{row['median_ms']:.0f}", _number(row.get("faster_than_live"), ".2f")]
        figures.append(_number(row.get("tokens_per_second"), ",.0f"))
        cells.append([_name(row, rows), *figures, *([_number(row.get("peak_gib"), ".1f")] if memory else [])])
    return markdown(headings, cells)


def pack(result: Result) -> str:
    """A table a task."""
    parts = []
    for (_, task), rows in grouped(result.rows, "shape", "task").items():
        cells = [[_name(r, rows), f"{r['median_ms']:.3g}", f"{r['against_efface']:.3g}"] for r in rows]
        parts.append(f"### {task}\n\n{markdown(['provider', 'median ms', 'x efface'], cells)}")
    return "\n\n".join(parts)


def evaluate(result: Result) -> str:
    """A table a shape of either part: log-likelihoods, greedy answers."""
    parts = []
    for (shape,), rows in grouped(result.record.get("likelihood", []), "shape").items():
        first = rows[0]
        said = f"{shape}: log-likelihoods of {first['answers']} answers, {first['data']}"
        parts.append(f"### {said}\n\n{likelihood_table(rows)}")
    for (shape,), rows in grouped(result.record.get("generation", []), "shape").items():
        first = rows[0]
        said = f"{first['questions']} greedy answers, {first['mean_tokens']:.0f} tokens on average"
        parts.append(f"### {shape}: {said}, {first['longest']} at most\n\n{generation_table(rows)}")
    return "\n\n".join(parts)


def likelihood_table(rows: Rows) -> str:
    """One shape: the tokens that the model reads, time, times faster than the padded loop, error against it in fp32."""
    headings = ["scorer", "tokens read", "median ms", "times faster, median of rounds", "error"]
    cells = []
    for row in rows:
        figures = [f"{row['tokens']}", f"{row['median_ms']:.0f}", f"{row['faster_than_padded']:.2f}"]
        cells.append([_name(row, rows), *figures, f"{row['error']:.1e}"])
    return markdown(headings, cells)


def generation_table(rows: Rows) -> str:
    """One shape: time, and how many times efface's."""
    cells = [[_name(row, rows), f"{row['median_ms']:.0f}", f"{row['against_efface']:.2f}"] for row in rows]
    return markdown(["greedy answers", "median ms", "x efface"], cells)


def start(result: Result) -> str:
    """What a user waits for; what efface adds to what it stands on."""
    headings = ["until", "median ms", "added ms", "to"]
    cells = []
    for row in result.rows:
        added = [_number(row["above_ms"], ".0f"), "" if row["above_ms"] is None else row["compared_with"]]
        cells.append([row["task"], f"{row['median_ms']:.0f}", *added])
    return markdown(headings, cells)


SUITES: dict[str, Callable[[Result], str]] = {
    "evaluate": evaluate,
    "loss": loss,
    "pack": pack,
    "start": start,
    "step": step,
}


def table(result: Result) -> str:
    """Return the tables of a result."""
    return SUITES[result.suite](result)
