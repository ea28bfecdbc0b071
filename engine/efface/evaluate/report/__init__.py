"""Reports that compare the evaluations of any number of runs, as one HTML page or as Markdown."""

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
    """Write a self-contained HTML report on the evaluations in folders, and return its path.

    The report contains a table of the runs ranked by Forget Quality, a plot of Forget Quality against Model Utility,
    curves over steps and checkpoints, and leak audits. For the best runs it also contains the truth ratios of the
    forget rows with the Kolmogorov-Smirnov statistic, and the worst leaks. The same files give the same bytes. A run
    whose files cannot be read is listed with the reason.

    Args:
        folders: runs, or folders that contain runs at any depth. A run is recognised by ``TOFU_EVAL.json``,
            ``TOFU_SUMMARY.json``, ``eval_log_aggregated.json``, ``AUDIT.json`` or ``trainer_state.json``. Paths of
            logs are accepted too.
        output: the HTML file; an existing file is replaced.
        markdown: optional Markdown file for the same report. Its pictures are written to the folder
            ``<name>-pictures`` in the same directory.
        full: log of the model before unlearning, or a folder that contains the log.
        retain_log: log of a model trained only on the retain set, or a folder that contains the log. Without it, the
            report uses the log that ``efface evaluate --retain-model`` wrote into a run's folder. If there is no such
            log either, it shows the Forget Quality that the evaluations stored.
        floor: runs with a Model Utility below ``floor`` times that of the full model are ranked last; 0 ranks all runs
            together.
        details: number of the best runs that are shown row by row.

    Raises:
        FileNotFoundError: a path does not exist.
        ImportError: a package of the extra ``report`` is not installed.
        ValueError: there is nothing to report in a folder; the full or retain log cannot be read; a setting is out of
            range; or an output is a folder or one of the logs.
    """
    check_extras("efface.evaluate.report", "report")
    # matplotlib takes a moment to import, and evaluations during training do not need it
    from efface.evaluate.report.write import write_report  # noqa: PLC0415

    write_report(folders, output, markdown=markdown, full=full, retain_log=retain_log, floor=floor, details=details)
    return Path(output)
