"""``efface report``: compare evaluated runs on one HTML page."""

from collections.abc import Sequence
from pathlib import Path

from efface.cli.progress import add_json_flag, open_console, show_json
from efface.flags import FlagParser

_EXAMPLES = """
examples:
  efface report runs/ --full evals/full --retain-log evals/retain90/TOFU_EVAL.json
  efface report npo/ simnpo/ --output npo-simnpo.html --markdown npo-simnpo.md
  efface report saves/unlearn/ --floor 0.8     # runs of open-unlearning

The command searches the folders at any depth for TOFU_EVAL.json, TOFU_SUMMARY.json,
eval_log_aggregated.json, AUDIT.json and trainer_state.json. Results in checkpoint-N
folders become curves over steps.
"""


def parser() -> FlagParser:
    """Return the parser of the command's flags."""
    flags = FlagParser(
        "report",
        "Writes one HTML file that compares evaluated runs: a ranked table, Forget Quality against Model Utility, "
        "curves over steps, truth ratios of the forget rows, leak audits, and the worst leaks.",
        _EXAMPLES,
    )
    flags.add_argument("folders", nargs="+", metavar="DIR", help="a run, a folder of runs, or an evaluation log")
    flags.add_argument(
        "--output", type=Path, default=Path("report.html"), help="HTML file to write (default: report.html)"
    )
    flags.add_argument("--markdown", type=Path, metavar="FILE.md", help="also write the report as Markdown")
    flags.add_argument("--full", metavar="DIR", help="evaluation of the model before unlearning")
    flags.add_argument("--retain-log", metavar="FILE", help="evaluation of a model trained on the retain set only")
    flags.add_argument(
        "--floor",
        type=float,
        default=0.9,
        help="rank runs below this share of the full model's Model Utility after the others (default: 0.9)",
    )
    flags.add_argument(
        "--details", type=int, default=12, metavar="N", help="show the forget rows of the N best runs (default: 12)"
    )
    add_json_flag(flags)
    return flags


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    from efface.evaluate.report.write import write_report

    content = write_report(
        options.folders,
        options.output,
        markdown=options.markdown,
        full=options.full,
        retain_log=options.retain_log,
        floor=options.floor,
        details=options.details,
    )
    written = [options.output, *([] if options.markdown is None else [options.markdown])]
    if options.json:
        show_json({"written": written, **content.to_json()})
    else:
        open_console().print(f"wrote {', '.join(map(str, written))}")
    return 0
