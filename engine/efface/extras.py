"""Optional dependencies: the packages of each extra of efface, and the error for one that is not installed."""

import importlib.util

EXTRAS = {
    "bitsandbytes": ("bitsandbytes",),
    "cli": ("rich", "shtab"),
    "evaluate": ("nltk", "rouge_score", "scipy"),
    "flash": ("flash_attn",),
    "lora": ("peft",),
    "report": ("matplotlib", "scipy"),
    "sweep": ("optuna",),
}
"""Importable modules by extra; ``pyproject.toml`` names the distributions that contain them."""


def check_extras(user: str, *extras: str, remedy: str = "") -> None:
    """Raise ImportError if a package of the extras is not installed, with the command that installs all of them.

    Args:
        user: what needs the packages: the subject of the message, a singular noun.
        extras: keys of ``EXTRAS``.
        remedy: what the user can do instead of installing them.
    """
    missing = {extra: {name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None} for extra in extras}
    wanted = [extra for extra, names in missing.items() if names]
    if wanted:
        modules = sorted(set().union(*missing.values()))
        packages = f"the package{'s' * (len(modules) > 1)} {', '.join(modules)}"
        instead = f", or {remedy}" if remedy else ""
        raise ImportError(
            f"{user} needs {packages}, not installed here; pip install 'efface[{','.join(wanted)}]'{instead}"
        )
