"""Make README's blocks, docs/benchmarks.md and the plots from benchmarks/results/*.json, and from nothing else."""

from pathlib import Path

from benchmarks.publish import pages, plots, results

ROOT = Path(__file__).resolve().parents[2]


def everything(root: Path = ROOT) -> None:
    """Write all of them."""
    found = results.read(root / "benchmarks" / "results")
    drawn = plots.draw(found, root / "benchmarks" / "results" / "plots")
    readme = root / "README.md"
    readme.write_text(pages.filled(readme.read_text(encoding="utf-8"), found), encoding="utf-8")
    (root / "docs" / "benchmarks.md").write_text(pages.page(found, drawn), encoding="utf-8")
