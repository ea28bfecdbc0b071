"""Offline check of the links in all pages and README files: ``python docs/links.py`` lists dead links and exits 1.

Checked are Markdown links and images, reference definitions, HTML ``href`` and ``src``, and MyST's ``{doc}`` and
``{ref}`` roles. A relative target must be a file or folder of the checkout, and its anchor a heading or label there. Of
an external link only the form is checked; nothing is fetched.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("benchmarks", "bindings", "csrc", "docs", "engine", "kernels", "tests")

_FENCE = re.compile(r"^\s*(`{3,}|~{3,}|:{3,})")
_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
_INLINE = re.compile(r"\]\(\s*(<[^<>]*>|[^\s()]*(?:\([^\s()]*\)[^\s()]*)*)(?:\s+\"[^\"]*\")?\s*\)")
_DEFINITION = re.compile(r"^\s{0,3}\[[^\]^][^\]]*\]:\s+<?([^\s>]+)>?")
_ATTRIBUTE = re.compile(r"<[^<>]*\b(?:href|src)=[\"']([^\"']*)[\"']")
_AUTOLINK = re.compile(r"<(https?:[^<>]*)>")
_ROLE = re.compile(r"\{(doc|ref)\}`(?:[^`<]*<([^`<>]+)>|([^`<>]+))`")
_LABEL = re.compile(r"^\(([^()\s]+)\)=\s*$")
_HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*#*\s*$")
_EXTERNAL = re.compile(r"https?://[A-Za-z0-9][A-Za-z0-9.-]*\.[A-Za-z]{2,}(:\d+)?([/?#][^\s<>\"]*)?")

# Files that conf.py writes when Sphinx starts; `sphinx -W` reports those that are missing.
_MADE = ("docs/_made", "docs/reference/commands.md")


@dataclass(frozen=True)
class Link:
    """A link in a page.

    Attributes:
        page: the file.
        line: line number, from 1.
        kind: "link", or the name of a role: "doc" or "ref".
        target: path, URL, document or label, as written.
    """

    page: Path
    line: int
    kind: str
    target: str


def pages(root: Path = ROOT) -> list[Path]:
    """Return the Markdown files at the top level, the README files of packages, and every page of ``docs/``."""
    found = {*root.glob("*.md"), *(root / "docs").rglob("*.md")}
    for package in PACKAGES:
        found.update((root / package).rglob("README.md"))
    made = [root / place for place in _MADE]
    return sorted(page for page in found if not any(page.is_relative_to(place) for place in made))


def links(page: Path) -> Iterator[Link]:
    """Yield the links of a page, without those in code."""
    for number, line in _lines_outside_code(page):
        for role in _ROLE.finditer(line):
            yield Link(page, number, role[1], (role[2] or role[3]).strip())
        text = _CODE.sub("", line)
        for pattern in (_INLINE, _DEFINITION, _ATTRIBUTE, _AUTOLINK):
            for match in pattern.finditer(text):
                yield Link(page, number, "link", match[1].strip("<>"))


def dead_links(root: Path = ROOT) -> list[str]:
    """Return a message for each link that leads nowhere, in the order of pages and lines."""
    labels = {label for page in (root / "docs").rglob("*.md") for label in _labels(page)}
    found = ((link, _fault(link, root, labels)) for page in pages(root) for link in links(page))
    return [f"{link.page.relative_to(root)}:{link.line}: {link.target!r}: {fault}" for link, fault in found if fault]


def _fault(link: Link, root: Path, labels: set[str]) -> str | None:
    """Return what is wrong with a link, None if nothing is."""
    if link.kind == "ref":
        return None if link.target in labels else "expected a label of docs/, got none of this name"
    if link.kind == "doc":
        base = root / "docs" if link.target.startswith("/") else link.page.parent
        target = (base / f"{link.target.lstrip('/')}.md").resolve()
        return None if _exists(target, root) else f"expected a page, got no file {_shown(target, root)}"
    if ":" in link.target.partition("/")[0]:
        return None if _EXTERNAL.fullmatch(link.target) else "expected https://host/path, or a relative path"
    return _local_fault(link, root)


def _local_fault(link: Link, root: Path) -> str | None:
    path, _, anchor = map(unquote, link.target.partition("#"))
    if not path and not anchor:
        return "expected a target, got none"
    target = (link.page.parent / path).resolve() if path else link.page
    if not target.is_relative_to(root):
        return "expected a path inside the checkout"
    if not _exists(target, root):
        return f"expected a file or folder, got nothing at {_shown(target, root)}"
    if anchor and target.suffix == ".md" and target.is_file() and anchor not in _anchors(target):
        return f"expected a heading or label in {_shown(target, root)}, got none with this anchor"
    return None


def _exists(target: Path, root: Path) -> bool:
    return target.exists() or any(target.is_relative_to(root / place) for place in _MADE)


def _shown(target: Path, root: Path) -> str:
    return str(target.relative_to(root)) if target.is_relative_to(root) else str(target)


def _lines_outside_code(page: Path) -> Iterator[tuple[int, str]]:
    """Yield numbered lines that are not in a fenced block of code; those in a ``:::`` block are text."""
    fence = ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        opening = _FENCE.match(line)
        if fence:
            if opening and opening[1].startswith(fence) and line.strip() == opening[1]:
                fence = ""
        elif opening and opening[1][0] != ":":
            fence = opening[1]
        else:
            yield number, line


@cache
def _labels(page: Path) -> frozenset[str]:
    """Return the targets that a page declares, ``(name)=``."""
    return frozenset(match[1] for _, line in _lines_outside_code(page) if (match := _LABEL.match(line)))


@cache
def _anchors(page: Path) -> frozenset[str]:
    """Return the anchors of a page's headings, as GitHub and MyST make them, and its labels."""
    anchors: set[str] = set(_labels(page))
    for _, line in _lines_outside_code(page):
        if heading := _HEADING.match(line):
            slug = anchor_of(heading[2])
            count = 0
            while (name := f"{slug}-{count}" if count else slug) in anchors:
                count += 1
            anchors.add(name)
    return frozenset(anchors)


def anchor_of(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    text = re.sub(r"!?\[([^\]]*)\]\([^()]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def main() -> int:
    """Print the dead links; return the exit code."""
    found = dead_links()
    for message in found:
        print(message, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
