"""Loading and checking of recipe files, and lookup of local files for data sets of the Hub."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from efface.errors import reading
from efface.flags import did_you_mean
from efface.hf.train.arguments import UnlearnArguments
from efface.recipes.command import UnlearnCommand
from efface.recipes.flags import SettingsParser

FOLDER = Path(__file__).parent
ARCHITECTURES = FOLDER / "architectures.yaml"
FLAG_CLASSES = (UnlearnCommand, UnlearnArguments)
BENCHMARKS = ("tofu", "none")

# Section -> type of its content. The first three sections are required.
_SECTIONS: dict[str, type | tuple[type, ...]] = {
    "about": str,
    "unlearn": dict,
    "evaluate": dict,
    "source": str,
    "published": dict,
    "ours": list,
    "architecture": (str, dict),
    "rows": dict,
    "tiny": dict,
}
_WORDS: dict[type, str] = {dict: "`name: value` lines", list: "a list", str: "text"}
_REQUIRED = ("about", "unlearn", "evaluate")
_EVALUATION = ("benchmark", "data", "split", "protocol", "retain_model", "retain_log")
_NOT_A_RECIPE = ("recipe", "data", "scale", "output_dir", "output", "dry_run", "json", "overwrite")
_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")


@dataclass(frozen=True)
class Recipe:
    """The contents of a recipe file; ``README.md`` in this folder explains the sections.

    Attributes:
        name: name of the file without its suffix.
        path: path of the file.
        about: description in one line.
        unlearn: flags of ``efface unlearn``. A refusal file in the folder of the recipe has its full path.
        evaluate: ``benchmark`` and its settings.
        source: source of the settings, such as a paper.
        published: figures of the source, by name.
        ours: settings that the source does not state.
        architecture: configuration in transformers' names; empty if unknown.
        rows: numbers of rows of ``forget`` and ``retain``.
        tiny: flags that differ with ``--scale tiny``.
    """

    name: str
    path: Path
    about: str
    unlearn: Mapping[str, Any]
    evaluate: Mapping[str, Any]
    source: str = ""
    published: Mapping[str, float] = field(default_factory=dict)
    ours: tuple[str, ...] = ()
    architecture: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    tiny: Mapping[str, Any] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """A YAML loader that raises an error for a duplicate key. PyYAML would silently use the last value."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names: list[Any] = []
        for key, _ in node.value:
            name = self.construct_object(key)
            if name in names:
                raise yaml.constructor.ConstructorError(None, None, f"found {name!r} twice", key.start_mark)
            names.append(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not valid YAML, or a mapping in it has a duplicate key.
    """
    where, remedy = repr(str(path)), "correct it there, and save the file as UTF-8"
    with reading(where, "YAML", remedy):
        try:
            return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
        except yaml.MarkedYAMLError as error:
            where += "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
            raise ValueError(f"{where}: expected YAML, got something else ({error.problem}); {remedy}") from error


def check_source(source: str, where: str) -> None:
    """Raise ValueError if a source has more parts than ``name:config:split``."""
    if source.count(":") > 2:
        raise ValueError(f"{where}: expected a file or name:config:split of a Hub data set, got {source!r}")


def file_stem(source: str) -> str:
    """Return the stem of a local file for a Hub data set: its configuration, or else the last part of its name."""
    name, _, rest = source.partition(":")
    return rest.partition(":")[0] or name.rpartition("/")[2]


def local_source(source: str, folder: str | Path, flag: str) -> str:
    """Return the path of the local file for a Hub data set. A source that is a file is returned unchanged.

    Args:
        source: a file, or ``name[:config[:split]]`` of a Hub data set.
        folder: folder with the files.
        flag: name of the flag, for the message.

    Raises:
        FileNotFoundError: the folder does not exist, or has no file for the data set.
    """
    if Path(source).expanduser().suffix.lower() in _SUFFIXES:
        return source
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise FileNotFoundError(f"--data: expected a folder, got {str(folder)!r}; check the path")
    stem = file_stem(source)
    for suffix in _SUFFIXES:
        if (file := place / f"{stem}{suffix}").is_file():
            return str(file)
    raise FileNotFoundError(
        f"--data {str(folder)!r}: expected {stem}{'|'.join(_SUFFIXES)} in it, for {flag} {source}; put the file there, "
        f"or give {flag} its path"
    )


def known_recipes() -> dict[str, Path]:
    """Return name -> file of the recipes that come with efface."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml")) if path != ARCHITECTURES}


def load_recipe(name: str | Path) -> Recipe:
    """Load a recipe by its name in ``known_recipes`` or by the path of its file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: an unknown name, an invalid recipe file, or unknown flags of ``efface unlearn`` in it.
    """
    path = _path(str(name))
    content = _mapping(path)
    _check_sections(content, path)
    unlearn, tiny = (_flags(content, section, path) for section in ("unlearn", "tiny"))
    settings_parser().check_required(unlearn, f"{path}: unlearn: ")
    if "refusal_file" in unlearn:
        unlearn["refusal_file"] = _beside(unlearn["refusal_file"], path)
    for role in ("forget", "retain"):
        if role in unlearn:
            check_source(unlearn[role], f"{path}: unlearn: {role}")
    return Recipe(
        name=path.stem,
        path=path,
        unlearn=unlearn,
        tiny=tiny,
        architecture=_architecture(content.get("architecture", {}), path),
        ours=tuple(map(str, content.get("ours", ()))),
        **{key: value for key, value in content.items() if key not in ("unlearn", "tiny", "architecture", "ours")},
    )


@functools.cache
def settings_parser() -> SettingsParser:
    """Return the cached parser of the flags of ``efface unlearn``, which converts the values of recipes and sweeps."""
    return SettingsParser("unlearn", FLAG_CLASSES)


def _flags(content: Mapping[str, Any], section: str, path: Path) -> dict[str, Any]:
    """Check the flags of a section. Return them unconverted, with underscores in their names."""
    flags = content.get(section, {})
    settings_parser().converted(flags, f"{path}: {section}")
    flags = {str(name).replace("-", "_"): value for name, value in flags.items()}
    if wrong := [name for name in _NOT_A_RECIPE if name in flags]:
        raise ValueError(f"{path}: {section}: {wrong[0]!r} belongs to one run, not to a recipe; drop it")
    return flags


def _path(name: str) -> Path:
    known = known_recipes()
    if name in known:
        return known[name]
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise FileNotFoundError(f"recipe file {name!r} does not exist; check the path")
        return path
    hint = did_you_mean(name, known, cutoff=0.4)
    raise ValueError(f"recipe: expected one of {', '.join(known)}, or the path of a YAML file, got {name!r}{hint}")


def _mapping(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected sections {', '.join(_REQUIRED)}, got {type(content).__name__}")  # noqa: TRY004 - invalid content, not a wrong type
    return content


def _check_sections(content: Mapping[str, Any], path: Path) -> None:
    for section in content:
        if section not in _SECTIONS:
            hint = did_you_mean(section, _SECTIONS)
            raise ValueError(f"{path}: expected sections {', '.join(_SECTIONS)}, got {section!r}{hint}")
    for section in _REQUIRED:
        if section not in content:
            raise ValueError(f"{path}: expected a section {section!r}, got {', '.join(content) or 'none'}")
    for section, kind in _SECTIONS.items():
        if section in content and not isinstance(content[section], kind):
            wanted = " or ".join(_WORDS[one] for one in _types(kind))
            raise ValueError(f"{path}: {section}: expected {wanted}, got {content[section]!r}")
    _check_numbers(content.get("published", {}), f"{path}: published")
    _check_numbers(content.get("rows", {}), f"{path}: rows", ("forget", "retain"))
    _check_evaluation(content["evaluate"], f"{path}: evaluate")


def _types(kind: type | tuple[type, ...]) -> tuple[type, ...]:
    return kind if isinstance(kind, tuple) else (kind,)


def _check_numbers(values: Mapping[str, Any], where: str, names: tuple[str, ...] | None = None) -> None:
    for name, value in values.items():
        if names is not None and name not in names:
            raise ValueError(f"{where}: expected {', '.join(names)}, got {name!r}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{where}: {name}: expected a number, got {value!r}")  # noqa: TRY004 - as above


def _check_evaluation(values: Mapping[str, Any], where: str) -> None:
    for name in values:
        if name not in _EVALUATION:
            raise ValueError(f"{where}: expected {', '.join(_EVALUATION)}, got {name!r}")
    if values.get("benchmark") not in BENCHMARKS:
        raise ValueError(f"{where}: benchmark: expected {' or '.join(BENCHMARKS)}, got {values.get('benchmark')!r}")
    if values["benchmark"] == "tofu" and "split" not in values:
        raise ValueError(f"{where}: split: expected the forget split, such as forget10, got none")


def _beside(name: Any, recipe: Path) -> Any:
    """Return the path of a file in the folder of the recipe, or the name unchanged if there is no such file."""
    beside = recipe.parent / str(name)
    return str(beside) if beside.is_file() else name


def _architecture(value: str | Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        if value and "model_type" not in value:
            raise ValueError(f"{path}: architecture: expected a configuration with model_type, got {dict(value)}")
        return value
    known: dict[str, dict[str, Any]] = yaml.safe_load(ARCHITECTURES.read_text(encoding="utf-8"))
    if value not in known:
        raise ValueError(f"{path}: architecture: expected one of {', '.join(known)}, or a configuration, got {value!r}")
    return known[value]
