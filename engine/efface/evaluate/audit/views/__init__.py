"""The views of an audit, one a file, and their names."""

from efface.evaluate.audit.view import View
from efface.evaluate.audit.views.choice import Choice
from efface.evaluate.audit.views.cloze import Cloze
from efface.evaluate.audit.views.clues import Clues
from efface.evaluate.audit.views.direct import Direct
from efface.evaluate.audit.views.relearn import Relearn
from efface.evaluate.audit.views.sampling import BestOf
from efface.evaluate.audit.views.translated import Translated

VIEWS: dict[str, type[View]] = {view.name: view for view in (Direct, Cloze, Choice, Translated, BestOf, Clues, Relearn)}


def get_view(view: str | View) -> View:
    """Return a view by name, with its default settings, or the view given.

    Raises:
        ValueError: an unknown name; lists those that are known.
    """
    if isinstance(view, View):
        return view
    if view not in VIEWS:
        raise ValueError(f"`views`: expected some of {', '.join(VIEWS)}, got {view!r}")
    return VIEWS[view]()


__all__ = [
    "VIEWS",
    "BestOf",
    "Choice",
    "Cloze",
    "Clues",
    "Direct",
    "Relearn",
    "Translated",
    "View",
    "get_view",
]
