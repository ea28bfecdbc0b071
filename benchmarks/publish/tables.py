"""Results files of suites, named ``<device>-<date>[-suite].json``, and markdown tables of their rows.

Every number comes from the JSON file. Rows in which another implementation is faster are kept and marked.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.harness.report import cells

Rows: TypeAlias = Sequence[dict[str, Any]]
FASTER = "**faster than efface**"
# suite -> keys of its rows in the file
ROWS = {
    "loss": ("loss",),
    "step": ("step",),
    "pack": ("packing",),
    "evaluate": ("likelihood", "generation"),
    "start": ("start",),
}
NAME = re.compile(r"(?P<device>[\w-]+?)-(?P<date>\d{4}-\d\d-\d\d)(?:-(?P<suite>[a-z-]+))?")


@dataclass(frozen=True)
class Result:
    """The contents of a results file."""

    file: str  # file name
    suite: str
    record: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The measured rows."""
        return [row for key in ROWS[self.suite] for row in self.record.get(key, [])]

    @property
    def machine(self) -> dict[str, Any]:
        """The run's device, versions, date, commit and command."""
        machine: dict[str, Any] = self.record["machine"]
        return machine

    @property
    def on_gpu(self) -> bool:
        """Whether the run's machine had a GPU."""
        return "gpu" in self.machine

    @property
    def described(self) -> str:
        """The conditions of the run in a sentence."""
        m = self.machine
        device = m.get("gpu") or f"{m['threads']} threads, {m['processor']}"
        said = [device, f"torch {m['torch']}"]
        said += [f"{name} {version}" for name, version in m.get("rivals", {}).items()]
        if "load_average" in m:
            end = self.record.get("load_average_at_end", m["load_average"])
            said.append(f"load average {m['load_average']:.1f} at the start, {end:.1f} at the end")
        return f"{', '.join(said)}, {m['date']}, commit {m['commit'][:12]}. `{m['command']}`"


def read(folder: Path) -> list[Result]:
    """Return the results in every file of the folder, oldest first.

    Raises:
        ValueError: a file is not named ``<device>-<date>[-suite].json``.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        if NAME.fullmatch(path.stem) is None:
            raise ValueError(f"`{path.name}`: expected <device>-<date>[-suite].json; rename the file")
        record = json.loads(path.read_text(encoding="utf-8"))
        every = (Result(path.name, suite, record) for suite in ROWS)
        found += [result for result in every if result.rows]
    return sorted(found, key=lambda result: (result.machine["date"], result.machine.get("time", ""), result.file))


def newest(found: list[Result], suite: str, *, gpu: bool) -> Result | None:
    """Return the newest result of a suite on a GPU or a CPU, or None."""
    own = [result for result in found if result.suite == suite and result.on_gpu == gpu]
    return own[-1] if own else None


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a markdown table; the first column contains names, the others numbers."""
    lines = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def grouped(rows: Rows, *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Return the rows grouped by the values of ``keys``, in their order."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups


def is_ours(row: dict[str, Any]) -> bool:
    """Return whether the row is one of efface's."""
    return str(row["provider"]).startswith("efface")


def _work(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the properties that two rows must share to be compared."""
    return row.get("training"), row.get("reference"), row.get("task"), row.get("mode")


def beaten(row: dict[str, Any], rows: Rows) -> bool:
    """Return whether the row's median is below efface's best for the same work. The bare GEMMs do not count."""
    if is_ours(row) or row["provider"].startswith("bare") or row.get("median_ms") is None:
        return False
    own = [each["median_ms"] for each in rows if is_ours(each) and _work(each) == _work(row) and each.get("median_ms")]
    return bool(own) and row["median_ms"] < min(own)


def name_of(row: dict[str, Any], rows: Rows) -> str:
    """Return the provider's name for a table, marked if it is faster than efface."""
    return f"{row['provider']}{', ' + FASTER if beaten(row, rows) else ''}"


def loss(result: Result) -> str:
    """Return a table for each shape, the row pass alone, and what was not measured."""
    parts = []
    for (shape,), rows in grouped(result.rows, "shape").items():
        first = rows[0]
        wall = any(row.get("wall_ms") is not None for row in rows)
        size = f"{first['objective']}, N {first['n']}, D {first['d']}, V {first['v']}, {first['dtype']}"
        times = ["median ms", *(["wall ms"] if wall else []), "quartiles"]
        headings = ["provider", "GEMMs", *times, "x floor", "% of floor", "error dh", "error dW", "GiB"]
        body = [_loss_cells(row, rows, wall=wall) for row in rows]
        parts.append(f"### {shape}: {size}, {first['state']}, {first['rounds']} rounds\n\n{markdown(headings, body)}")
    if "row_pass_ms" in result.record:
        passes = [[name, f"{ms:.3g}"] for name, ms in result.record["row_pass_ms"].items()]
        parts.append("### The row pass alone, (1024, 32000) bf16\n\n" + markdown(["pass", "median ms"], passes))
    missing = result.record.get("not_measured", [])
    if missing:
        parts.append("### Not measured\n\n" + "\n".join(f"- {reason}" for reason in missing))
    return "\n\n".join(parts)


def _loss_cells(row: dict[str, Any], rows: Rows, *, wall: bool) -> list[str]:
    return [
        name_of(row, rows),
        str(row["gemms"]),
        *cells(".4g", row["median_ms"], *([row.get("wall_ms")] if wall else [])),
        " .. ".join(cells(".4g", row["quarter_ms"], row["three_quarters_ms"])),
        f"{row['against_floor']:.2f}",
        f"{row['of_floor_percent']:.0f}",
        *cells(".1e", row["errors"].get("dh"), row["errors"].get("dw")),
        *cells(".2f", row.get("peak_gib")),
    ]


def plain(result: Result) -> list[dict[str, Any]]:
    """Return the rows of the step suite that were measured without a chat template."""
    return [row for row in result.rows if not row.get("chat")]


def step(result: Result) -> str:
    """Return a table for each shape, and with a chat template one of the attention."""
    parts = []
    for (shape,), rows in grouped(result.rows, "shape").items():
        parts.append(f"### {shape}")
        if (first := rows[0]).get("chat"):
            parts.append(
                f"{first['objective'].upper()} on {first['data']}. A step has {first['real_tokens']:.0f} tokens, "
                f"{first['padded_tokens']:.0f} with padding (means)."
            )
        parts.append(step_table(rows))
        layer = [row for row in result.record.get("attention", []) if row["shape"] == shape]
        if layer:
            parts.append("The attention of one layer; the last row is a part of the one above it.")
            parts.append(attention_table(layer))
    return "\n\n".join(parts)


def step_table(rows: Rows) -> str:
    """Return one shape's table: time, speed-up over the eager step, tokens per second, memory.

    Columns without a value in any row are left out, except the times.
    """
    optional: list[tuple[str, Callable[[dict[str, Any]], float | None], str]] = [
        ("tokens run", lambda row: row["tokens_run"] if row.get("chat") else None, ".0f"),
        ("median ms", lambda row: row["median_ms"], ".0f"),
        ("times faster, median of rounds", lambda row: row.get("faster_than_live"), ".2f"),
        ("than with every sequence whole", lambda row: row.get("faster_than_unshared"), ".2f"),
        ("tokens/s, with AdamW", lambda row: row.get("tokens_per_second"), ",.0f"),
        ("peak GiB", lambda row: row.get("peak_gib"), ".1f"),
        ("MiB for a step", lambda row: row.get("step_mib"), ".0f"),
    ]
    always = ("median ms", "times faster, median of rounds", "tokens/s, with AdamW")
    timed = [row for row in rows if row.get("median_ms") is not None]
    columns = [each for each in optional if each[0] in always or any(each[1](row) is not None for row in timed)]
    body = []
    for row in rows:
        if row.get("median_ms") is None:
            body.append([row["provider"], row.get("problem") or "", *[""] * (len(columns) - 1)])
        else:
            body.append([name_of(row, rows), *(cells(form, value(row))[0] for _, value, form in columns)])
    return markdown(["forward and backward", *(heading for heading, _, _ in columns)], body)


def attention_table(rows: Rows) -> str:
    """Return one shape's table: forward and backward, and the part of both that gathers keys and values."""
    body = []
    for row in rows:
        shares = cells(".0%", row.get("forward_share"), row.get("backward_share"))
        times = cells(".2f", row["forward_ms"], row["backward_ms"])
        body.append([row["part"], str(row["tokens"]), str(row["keys"]), *times, *shares])
    headings = ["attention", "tokens", "keys", "forward ms", "backward ms", "of the forward", "of the backward"]
    return markdown(headings, body)


def pack(result: Result) -> str:
    """Return a table for each task."""
    parts = []
    for (_, task), rows in grouped(result.rows, "shape", "task").items():
        body = [[name_of(row, rows), *cells(".3g", row["median_ms"], row["against_efface"])] for row in rows]
        parts.append(f"### {task}\n\n{markdown(['provider', 'median ms', 'x efface'], body)}")
    return "\n\n".join(parts)


def evaluate(result: Result) -> str:
    """Return a table for each shape and part: log-likelihoods, then greedy answers."""
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
    """Return one shape's table: tokens read, time, speed-up over the padded loop, error against that loop in fp32."""
    headings = ["scorer", "tokens read", "median ms", "times faster, median of rounds", "error"]
    body = []
    for row in rows:
        figures = [f"{row['tokens']}", f"{row['median_ms']:.0f}", f"{row['faster_than_padded']:.2f}"]
        body.append([name_of(row, rows), *figures, f"{row['error']:.1e}"])
    return markdown(headings, body)


def generation_table(rows: Rows) -> str:
    """Return one shape's table: time, and the ratio to efface's time."""
    body = [[name_of(row, rows), f"{row['median_ms']:.0f}", f"{row['against_efface']:.2f}"] for row in rows]
    return markdown(["greedy answers", "median ms", "x efface"], body)


def start(result: Result) -> str:
    """Return a table of start-up times, and of what efface adds to the libraries that it imports."""
    body = []
    for row in result.rows:
        added = ["", ""] if row["above_ms"] is None else [f"{row['above_ms']:.0f}", row["compared_with"]]
        body.append([row["task"], f"{row['median_ms']:.0f}", *added])
    return markdown(["until", "median ms", "added ms", "to"], body)


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
