"""``efface cache``: list the entries of the cache folder with their data sets, or remove them."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table

from efface.cli.progress import add_json_flag, open_console, show_json
from efface.files import bytes_in_words
from efface.flags import FlagParser
from efface.hf.text.cache_entries import CacheEntry, entries, of_data, purge
from efface.hf.text.token_cache import cache_folder

_EXAMPLES = """
examples:
  efface cache list
  efface cache purge --data forget10.json
  efface cache purge --older-than 30 --dry-run

--data finds the tokens of a file by its content, or by its path if the file no longer
exists. Entries that a running process uses are not removed.
"""


def parser() -> FlagParser:
    """Return the parser of the command's flags."""
    flags = FlagParser(
        "cache",
        "Lists or removes the cached results of earlier runs: tokens of data sets, log-probabilities of references, "
        "and small trained models.",
        _EXAMPLES,
    )
    flags.add_argument("action", choices=("list", "purge"), help="list shows the entries; purge removes them")
    flags.add_argument("--data", nargs="+", metavar="FILE", help="only entries made from these files or Hub data sets")
    flags.add_argument(
        "--older-than", type=float, metavar="DAYS", help="only entries not used for at least this many days"
    )
    flags.add_argument("--token-cache", metavar="DIR", help="cache folder (default: $EFFACE_CACHE or ~/.cache/efface)")
    flags.add_argument(
        "--dry-run", action="store_true", help="with purge: show what would be removed, and remove nothing"
    )
    add_json_flag(flags)
    return flags


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code.

    Raises:
        NotADirectoryError: ``--token-cache`` is not a folder.
        OSError: a running process uses an entry that was to be removed.
        ValueError: a negative number of days, or ``--dry-run`` with ``list``.
    """
    options = parser().parse_args(argv)
    if options.older_than is not None and not options.older_than >= 0:
        raise ValueError(f"--older-than: expected a number of days from 0, got {options.older_than}")
    if options.dry_run and options.action == "list":
        raise ValueError("--dry-run: expected the action purge, got list; drop --dry-run")
    if options.token_cache is not None and not cache_folder(options.token_cache).is_dir():
        raise NotADirectoryError(f"--token-cache: expected a folder, got {options.token_cache!r}")
    found = entries(options.token_cache)
    chosen = of_data(found, options.data) if options.data else found
    if options.older_than is not None:
        chosen = [entry for entry in chosen if entry.days() >= options.older_than]
    if options.action == "purge" and options.data:
        # Leftovers, and tokens of earlier versions: efface does not read them, and their data set is unknown.
        chosen += [entry for entry in found if not entry.is_read and entry not in chosen]
    console, where = open_console(), cache_folder(options.token_cache)
    if options.json:
        plain = [{**asdict(entry), "path": str(entry.path), "days": round(entry.days(), 3)} for entry in chosen]
        show_json(plain)
    elif options.action == "list" or options.dry_run:
        open_console().print(_table(chosen))
    kept = purge(chosen, options.token_cache) if options.action == "purge" and not options.dry_run else []
    if not options.json:
        gone = [entry for entry in chosen if entry not in kept]
        verb = "removed" if options.action == "purge" and not options.dry_run else "in all"
        what = f"{len(gone)} {'entry' if len(gone) == 1 else 'entries'}, {bytes_in_words(sum(e.size for e in gone))}"
        console.print(f"{verb}: {what}; {where}")
    if kept:
        raise OSError(
            f"{len(kept)} {'entry is' if len(kept) == 1 else 'entries are'} in use by a running process, not removed "
            f"({', '.join(entry.path.name for entry in kept[:3])}); wait for the process or stop it, and purge again"
        )
    return 0


def _table(found: Sequence[CacheEntry]) -> Table:
    """Return a table with one line for each kind and data set."""
    groups: dict[tuple[str, str], list[CacheEntry]] = {}
    for entry in found:
        groups.setdefault((entry.kind, entry.source or entry.data[:12]), []).append(entry)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("what")
    table.add_column("of", overflow="fold")
    for heading in ("entries", "size", "days unused"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (kind, data), group in groups.items():
        size, days = bytes_in_words(sum(entry.size for entry in group)), min(entry.days() for entry in group)
        shown = data if not data.startswith("/") or len(data) < 40 else f"{Path(data).parent.name}/{Path(data).name}"
        table.add_row(kind, shown or "-", str(len(group)), size, f"{days:.1f}")
    return table
