"""Reports: the evaluations of one run or a hundred, as a page for people."""

from collections.abc import Sequence
from pathlib import Path

from efface.extras import check_extras

__all__ = ["report"]


def report(
    folders: str | Path | Sequence[str | Path],
    output: str | Path = "report.html",
    *,
    markdown: str | Path | None = None,
    full: str | Path | None = None,
    retain_log: str | Path | None = None,
    floor: float = 0.9,
    details: int = 12,
) -> Path:
    """Write one HTML file, which needs no other, about the evaluations in folders; return its path.

    It holds a table of the runs ranked by Forget Quality, Forget Quality against Model Utility, figures over steps and
    checkpoints, leak audits and, for the best runs, the truth ratios of the forget rows with the Kolmogorov-Smirnov
    statistic, and the worst leaks. The same files give the same bytes. A run whose files cannot be read is listed with
    the reason.

    Args:
        folders: runs, or folders of runs at any depth, with ``TOFU_EVAL.json``, ``TOFU_SUMMARY.json``,
            ``eval_log_aggregated.json``, ``AUDIT.json`` or ``trainer_state.json``; also logs by their paths.
        output: the HTML file; replaced if it is there.
        markdown: also write the report as Markdown, its pictures in a folder ``<name>-pictures`` beside it.
        full: log, or folder with the log, of the model before unlearning.
        retain_log: the same of a model trained on the retain set alone. Without it, what ``efface evaluate
            --retain-model`` left beside a run; without that, Forget Quality is what the evaluations stored.
        floor: runs with less Model Utility than so many times that of the full model are ranked after the others; 0
            ranks all alike.
        details: how many of the best runs are shown row by row.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: folders without anything to report, a full or retain log that cannot be read, settings out of range,
            an output that is one of the logs, or a folder.
    """
    check_extras("efface.evaluate.report", "report")
    # matplotlib takes a moment to load, and whoever evaluates during a run has no use for it
    from efface.evaluate.report.write import write_report  # noqa: PLC0415

    write_report(folders, output, markdown=markdown, full=full, retain_log=retain_log, floor=floor, details=details)
    return Path(output)
