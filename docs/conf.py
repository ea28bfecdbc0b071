"""Sphinx configuration: MyST pages, the furo theme, the API from docstrings. It also makes what the pages include."""

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import made  # noqa: E402 - beside this file

import efface  # noqa: E402 - installed

project = "efface"
author = copyright = "the efface authors"
version = release = efface.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
smartquotes = False  # or --flag in a docstring would be –flag
exclude_patterns = ["_made/*"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes and units beside the types
autodoc_class_signature = "mixed"
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"efface {release}"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["code.css"]
nitpicky = True  # a role that names nothing is an error; types of other packages are not looked up
nitpick_ignore_regex = [("py:(class|exc)", r"(collections|numpy|pathlib|torch|transformers)\..*")]
nitpick_ignore = [("py:exc", "NotFiniteError")]  # of autograd's checks, in a docstring that Sphinx includes


def _is_noise(_app: object, _what: str, _name: str, member: object, _skip: bool, _options: object) -> bool | None:
    """Leave out the fields of named tuples that only say their number; the signature has their names."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: Any) -> None:
    """Make the pictures, the commands' help and the tables of arguments before Sphinx reads the pages."""
    app.connect("autodoc-skip-member", _is_noise)
    made.pictures(HERE / "_made")
    made.command_help(HERE / "_made")
    made.argument_tables(HERE / "_made")
