"""The sizes at which a recipe runs on a CPU, and what that changes in its settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from efface.recipes import Recipe
from efface.simulate.teach import ARCHITECTURES, Size, Teaching

# A CPU has no paged optimizer, and gains nothing from half precision.
_ON_A_CPU = {"dtype": "float32", "bf16": False, "fp16": False, "optim": "adamw_torch"}
# What the scale provides: models taught on the spot, and rows for them.
_PROVIDED = (
    *("model", "revision", "reference_model", "reference_revision"),
    *("forget", "retain", "forget_filter", "retain_filter"),
)


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
        about: one line.
        forget_authors: at most, of TOFU's split; the last ones.
        retain_authors: TOFU's first ones.
        asked: retain rows that are evaluated, at most.
        world: real authors, and world facts, each at most.
        identities: of the FAME-like set, each in five languages.
        size: of the models.
        teaching: of full and retain.
        defaults: flags that differ for every recipe, unless its own ``tiny`` section says otherwise.
        limits: flags that differ whatever it says.
    """

    about: str
    forget_authors: int
    retain_authors: int
    asked: int
    world: int
    identities: int
    size: Size
    teaching: Teaching
    defaults: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)


SCALES = {
    "tiny": Scale(
        about="minutes on two cores",
        forget_authors=4,
        retain_authors=4,
        asked=80,
        world=20,
        identities=3,
        size=Size(hidden=128, layers=4, heads=4, vocabulary=2048),
        teaching=Teaching(steps=1200, batch=4, learning_rate=2e-3),
        defaults={"pairs_per_step": 4, "learning_rate": 5e-4},
    ),
    "smoke": Scale(
        about="seconds, to see that everything works; the numbers mean nothing",
        forget_authors=1,
        retain_authors=1,
        asked=8,
        world=4,
        identities=1,
        size=Size(hidden=32, layers=2, heads=4, vocabulary=512),
        teaching=Teaching(steps=10, batch=8, learning_rate=3e-3),
        limits={"pairs_per_step": 8, "num_train_epochs": 2},
    ),
}


def get_scale(name: str) -> Scale:
    """Return the scale of a name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SCALES:
        raise ValueError(f"--scale: expected one of {', '.join(SCALES)}, got {name!r}")
    return SCALES[name]


def tiny_flags(recipe: Recipe, scale: Scale) -> dict[str, Any]:
    """Return the flags of ``efface unlearn`` at a scale: the recipe's, but for models, data and what differs there."""
    kept = {name: value for name, value in recipe.unlearn.items() if name not in _PROVIDED}
    return {**kept, **_ON_A_CPU, **scale.defaults, **recipe.tiny, **scale.limits}


def check_recipe(recipe: Recipe) -> None:
    """Raise ValueError for a recipe that has no tiny form."""
    if (template := recipe.unlearn.get("template")) not in ARCHITECTURES:
        raise ValueError(
            f"{recipe.path}: --scale: expected template {', '.join(ARCHITECTURES)}, which say what a small model is "
            f"like, got {template!r}"
        )
