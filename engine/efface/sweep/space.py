"""The search space of a sweep: flags of ``efface unlearn``, each with a list of values or a range."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efface.flags import did_you_mean
from efface.recipes.recipe import read_yaml, settings_parser

if TYPE_CHECKING:
    import optuna

Value = bool | int | float | str
Point = dict[str, Value]

PRESETS = Path(__file__).parents[1] / "recipes" / "presets"
# Flags that cannot be varied: they concern one run, its output, or the evaluation by which trials are compared.
NOT_SWEPT = {"recipe", "data", "output_dir", "dry_run", "json", "overwrite", "evaluate", "retain_log", "scale"}
_RANGES = ("float", "log", "int")
_LONGEST_NAME = 120


@dataclass(frozen=True)
class Parameter:
    """A flag with its values or its range.

    Attributes:
        name: name of the flag.
        kind: "choice" of ``values``, or a range from ``low`` to ``high``: "float", "log" (uniform in the logarithm) or
            "int".
        values: the values of a choice.
        low: lowest value of a range.
        high: highest value of a range.
    """

    name: str
    kind: str
    values: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0

    def suggest(self, trial: "optuna.Trial") -> Value:
        """Return the value of a trial. The sampler of the study draws it if the trial has no value yet."""
        if self.kind == "choice":
            return self.values[self.values.index(trial.suggest_categorical(self.name, self.values))]
        if self.kind == "int":
            return trial.suggest_int(self.name, int(self.low), int(self.high))
        return trial.suggest_float(self.name, self.low, self.high, log=self.kind == "log")

    def described(self) -> Any:
        """Return the values as a list, or the range as text such as ``log:1e-06:0.0001``, for JSON."""
        return list(self.values) if self.kind == "choice" else f"{self.kind}:{self.low:g}:{self.high:g}"

    def some(self) -> tuple[Value, ...]:
        """Return the values to check: all of a choice, or the two ends of a range."""
        if self.kind == "choice":
            return self.values
        return (int(self.low), int(self.high)) if self.kind == "int" else (self.low, self.high)


Space = tuple[Parameter, ...]


def parse_grid(words: Sequence[str], where: str = "--grid") -> Space:
    """Return the parameters of ``["learning_rate=1e-5,2e-5", "beta=.1"]``.

    Args:
        words: one ``flag=values`` each.
        where: start of error messages.

    Raises:
        ValueError: a flag is unknown or cannot be varied, or a value is given twice or has the wrong type.
    """
    parsed = _split(words, where, "learning_rate=1e-5,2e-5")
    return tuple(_choice(name, values.split(","), where) for name, values in parsed.items())


def parse_space(words: Sequence[str], where: str = "--space") -> Space:
    """Return the parameters of ``["learning_rate=log:1e-6:1e-4", "alpha=choice:1,2"]``; see ``parse_grid``."""
    space = []
    for name, value in _split(words, where, "learning_rate=log:1e-6:1e-4").items():
        kind, _, rest = value.partition(":")
        if kind == "choice":
            space.append(_choice(name, rest.split(","), where))
        elif kind in _RANGES:
            space.append(_range(name, kind, rest, where))
        else:
            raise ValueError(
                f"{where} {name}: expected float:LOW:HIGH, log:LOW:HIGH, int:LOW:HIGH or choice:A,B, got {value!r}"
            )
    return tuple(space)


def known_presets() -> dict[str, Path]:
    """Return name -> file of the presets that come with efface."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}


def load_preset(name: str) -> Space:
    """Return the grid of a preset, given its name or the path of a YAML file.

    Raises:
        ValueError: an unknown name, or a file without a ``grid``; and as ``parse_grid``.
    """
    path = known_presets().get(name, Path(name))
    if not path.is_file():
        hint = did_you_mean(name, known_presets())
        raise ValueError(
            f"--preset: expected one of {', '.join(known_presets())}, or the path of a YAML file, got {name!r}{hint}"
        )
    content = read_yaml(path)
    grid = content.get("grid") if isinstance(content, dict) else None
    if not isinstance(grid, dict) or not all(isinstance(values, list) for values in grid.values()):
        raise ValueError(f"{path}: expected a section `grid` of `flag: [value, value]` lines, got {grid!r}")
    _check_names(grid, str(path))
    return tuple(_choice(name, list(map(str, values)), str(path)) for name, values in grid.items())


def points(space: Space) -> Iterator[Point]:
    """Yield every combination of the choices. The last parameter varies fastest."""
    for values in itertools.product(*(parameter.values for parameter in space)):
        yield {parameter.name: value for parameter, value in zip(space, values, strict=True)}


def point_name(point: Mapping[str, Value]) -> str:
    """Return a name such as ``learning_rate=1e-05,beta=0.1``, unique for each point and valid as a folder name."""
    short = {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in point.items()}
    name = ",".join(f"{name}={value}" for name, value in short.items())
    plain = "".join(letter if letter.isalnum() or letter in "=,.+-_" else "_" for letter in name)
    exact = all(float(short[key]) == value for key, value in point.items() if isinstance(value, float))
    if exact and plain == name and len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(json.dumps(dict(point)).encode()).hexdigest()[:8]
    return f"{plain[:_LONGEST_NAME]}-{digest}"


def _split(words: Sequence[str], where: str, example: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not equals or not name or not value:
            raise ValueError(f"{where}: expected flag=values, such as {example}, got {word!r}")
        if name in given:
            raise ValueError(f"{where}: expected each flag once, got {name} twice; give all its values at once")
        given[name] = value
    _check_names(given, where)
    return given


def _check_names(names: Mapping[str, Any], where: str) -> None:
    known = settings_parser().names
    for name in names:
        if name in NOT_SWEPT:
            raise ValueError(
                f"{where}: {name} cannot be varied, because it concerns one run or the evaluation; drop it"
            )
        if name not in known:
            hint = did_you_mean(name, known - NOT_SWEPT, "; see `efface unlearn --help`")
            raise ValueError(f"{where}: expected flags of `efface unlearn`, got {name!r}{hint}")


def _choice(name: str, texts: Sequence[str], where: str) -> Parameter:
    values = [_typed(name, text, where) for text in texts]
    for k, value in enumerate(values):
        if value in values[:k]:
            raise ValueError(f"{where} {name}: expected values that differ, got {value!r} twice")
    if not values:
        raise ValueError(f"{where} {name}: expected values, got none")
    return Parameter(name, "choice", tuple(values))


def _range(name: str, kind: str, text: str, where: str) -> Parameter:
    ends = text.split(":")
    if len(ends) != 2:
        raise ValueError(f"{where} {name}: expected {kind}:LOW:HIGH, got {kind}:{text}")
    try:
        low, high = (int(end) if kind == "int" else float(end) for end in ends)
    except ValueError as error:
        raise ValueError(f"{where} {name}: expected {kind}:LOW:HIGH with numbers, got {kind}:{text}") from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high and (kind != "log" or low > 0)):
        least = "0 < LOW < HIGH" if kind == "log" else "LOW < HIGH"
        raise ValueError(f"{where} {name}: expected {least}, got {text}")
    for end in (low, high):
        typed = _typed(name, str(end), where)
        if isinstance(typed, (bool, str)):
            raise ValueError(f"{where} {name}: expected choice:A,B for a flag that is not a number, got {kind}:{text}")  # noqa: TRY004 - an invalid value, not a wrong type
    return Parameter(name, kind, low=low, high=high)


def _typed(name: str, text: str, where: str) -> Value:
    value = settings_parser().converted({name: text.strip()}, where)[name]
    value = value.value if isinstance(value, Enum) else value
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} {name}: expected finite numbers, got {text!r}")
    if not isinstance(value, (bool, int, float, str)):
        raise ValueError(f"{where} {name}: expected a flag with one value, got one with several; drop it")  # noqa: TRY004 - an invalid value, not a wrong type
    return value
