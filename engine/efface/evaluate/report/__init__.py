"""Reports: the evaluations of one run or a hundred, as a page for people."""

from efface.evaluate.report.write import report

__all__ = ["report"]
