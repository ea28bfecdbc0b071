"""A report as one HTML file that needs no other."""

import base64
import hashlib
import re
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from efface.evaluate.report.content import Content

TEXT_LIMIT = 400  # letters of a text that are shown

_FOLDER = Path(__file__).parent / "templates"


def to_html(content: Content) -> str:
    """Return the page. Texts of models and files are escaped, and no script but the page's own may run."""
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    templates = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return templates.get_template("report.html.jinja").render(
        content=content,
        svg=Markup,  # matplotlib escapes the texts in its drawings
        words=_words,
        short=shortened,
        script=Markup(script),  # noqa: S704
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=version("efface"),
    )


def shortened(text: str) -> str:
    """Return the text, or its beginning."""
    return text if len(text) <= TEXT_LIMIT else f"{text[:TEXT_LIMIT]}…"


def _words(text: str) -> Markup:
    """Escape a sentence; what is between backticks becomes code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704
