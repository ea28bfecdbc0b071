"""A recipe end to end: two small models taught on its data, one made to forget, all three examined."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from efface.cli import run_folder as unlearned
from efface.cli.progress import ProgressBar, open_console
from efface.cli.training import unlearn
from efface.evaluate import EvalLog, tofu
from efface.files import PARTIAL, check_output
from efface.flags import flag_words, given_names, hyphens
from efface.hf.model.loading import load_model, load_tokenizer
from efface.hf.text.templates import get_template
from efface.hf.train.checkpoints import checkpoints
from efface.recipes import Recipe, load_recipe
from efface.recipes.flags import SettingsParser
from efface.recipes.recipe import settings_parser
from efface.recipes.settings import not_overridden, parse
from efface.simulate.data import SPLIT, TinyData, fame_data, made_up_data, tofu_data
from efface.simulate.scales import Scale, check_recipe, get_scale, tiny_flags
from efface.simulate.teach import digest, taught

RECORD, REQUEST = "tiny.json", "request.json"
_SHOWN = (
    *("forget_quality", "model_utility"),
    *("forget_truth_ratio", "forget_Q_A_Prob", "forget_Q_A_ROUGE"),
    *("retain_Truth_Ratio", "retain_Q_A_Prob", "retain_Q_A_ROUGE"),
)


@dataclass
class Examined:
    """A model and what its evaluation says; ``figures`` are empty where it could not be evaluated, as ``note`` says."""

    name: str
    folder: str
    figures: dict[str, float]
    note: str = ""


@dataclass(frozen=True)
class TinyRun:
    """What a recipe did at a small scale.

    Attributes:
        recipe: its name.
        scale: the scale's.
        data: what the rows are.
        flags: of ``efface unlearn``, at this scale.
        changed: those of them that differ from the recipe's.
        overrides: words of the command line that won over both.
        models: retain, full and unlearned.
        revisions: checkpoints of the unlearned model, which ``--revision`` of its folder takes.
    """

    recipe: str
    scale: str
    data: str
    flags: dict[str, Any]
    changed: dict[str, Any]
    overrides: list[str]
    models: list[Examined]
    revisions: list[str]


def tiny_data(recipe: Recipe, scale: Scale, folder: str | Path | None) -> TinyData:
    """Return the recipe's own data at a scale: TOFU's rows from a folder, else made-up ones.

    Raises:
        FileNotFoundError: a folder without TOFU's files.
        ValueError: as ``tofu_data`` and ``fame_data``.
    """
    if "forget_filter" in recipe.unlearn:
        rule: list[str] = recipe.unlearn["forget_filter"]
        return fame_data(rule, identities=scale.identities, asked=scale.asked, world=scale.world)
    counts = {name: getattr(scale, name) for name in ("forget_authors", "retain_authors", "asked", "world")}
    if folder is None:
        return made_up_data(**counts)
    return tofu_data(folder, recipe.evaluate["split"], **counts)


def run_tiny(
    recipe: Recipe,
    output: str | Path,
    *,
    scale: str = "tiny",
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    console: Console | None = None,
) -> TinyRun:
    """Run a recipe at a small scale.

    ``output`` gets ``data/`` (what it ran on, in TOFU's names), ``model/`` (the unlearned model and its checkpoints, as
    ``efface unlearn`` writes them), ``evaluation/`` (of retain, full and unlearned) and ``tiny.json``. The taught
    models stay in the cache, for every run on the same rows. A run that was stopped continues when it is asked for
    again.

    Args:
        recipe: see ``efface.recipes``.
        output: folder.
        scale: "tiny" or "smoke".
        data: a folder with TOFU's files; None makes authors up. Recipes that forget by a filter get a FAME-like set.
        overrides: words of the command line that win over the recipe's and the scale's flags.
        overwrite: begin anew in a folder that holds a finished run.
        console: for progress and warnings.

    Raises:
        FileExistsError: an output folder that holds other things, without ``overwrite``.
        FileNotFoundError: a data folder without TOFU's files.
        ValueError: a recipe that has no tiny form, or whatever ``efface unlearn`` refuses.
    """
    console = console or Console(quiet=True)
    check_recipe(recipe)
    chosen, output = get_scale(scale), Path(output)
    rows = tiny_data(recipe, chosen, data)
    flags, files = tiny_flags(recipe, chosen), output / "data"
    kept = not_overridden(flags, settings_parser().given(overrides))
    words = [*flag_words(kept), f"--forget={files / 'forget.json'}"]
    words += [f"--retain={files / 'retain.json'}", f"--output-dir={output / 'model'}", *overrides]
    parse([*words, "--model=taught"])  # what is wrong must not show when the models are taught
    _begin(
        output,
        {
            "recipe": recipe.name,
            "scale": asdict(chosen),
            "flags": flags,
            "overrides": list(overrides),
            "data": rows.name,
            "rows": digest(rows.files),
        },
        overwrite=overwrite,
    )
    console.print(f"{recipe.name} at scale {scale}: {rows.name}", highlight=False, soft_wrap=True)
    rows.write(files)
    folders = {name: _taught(name, rows, recipe, chosen, console) for name in ("retain", "full")}

    note = ""
    try:
        if not _finished(output / "model") or overwrite:
            words += [f"--model={folders['full']}", f"--overwrite={overwrite}"]
            unlearn(*parse(words), words)
    except FloatingPointError as error:  # a collapse is a result: the newest checkpoint shows how far it was
        note = str(error)
        console.print(f"{recipe.name}: {note}", highlight=False, soft_wrap=True)

    exam = _Exam(recipe, files, output / "evaluation", console)
    models = [exam.of(name, folder) for name, folder in folders.items()]
    revisions = [path.name for _, path in sorted(checkpoints(output / "model").items())]
    last = output / "model" / (revisions[-1] if note and revisions else "")
    if note and not revisions:
        models.append(Examined("unlearned", str(last), {}, note))
    else:
        models.append(replace(exam.of("unlearned", last), note=note))
    run = TinyRun(
        recipe=recipe.name,
        scale=scale,
        data=rows.name,
        flags=flags,
        changed={name: value for name, value in flags.items() if recipe.unlearn.get(name) != value},
        overrides=list(overrides),
        models=models,
        revisions=revisions,
    )
    _write(output / RECORD, {**asdict(run), "sizes": asdict(chosen)})
    return run


def _begin(output: Path, request: dict[str, Any], *, overwrite: bool) -> None:
    """Note what the folder is for, so that the same run continues there and another one does not.

    Raises:
        FileExistsError: a folder that holds other things, without ``overwrite``.
    """
    request = json.loads(json.dumps(request, default=str))
    try:
        known = json.loads((output / REQUEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        known = None
    if known != request:
        check_output(output, overwrite=overwrite)
        output.mkdir(parents=True, exist_ok=True)
        _write(output / REQUEST, request)


def _finished(folder: Path) -> bool:
    record = folder / unlearned.RECORD
    return record.is_file() and bool(json.loads(record.read_text(encoding="utf-8"))["finished"])


def _taught(name: str, rows: TinyData, recipe: Recipe, scale: Scale, console: Console) -> Path:
    bar = ProgressBar(console, f"teaching {name}", log=False)
    try:
        return taught(
            rows.files[f"taught_{name}"],
            list(rows.texts()),
            template=recipe.unlearn["template"],
            size=scale.size,
            teaching=scale.teaching,
            callbacks=[bar],
        )
    finally:
        bar.close()


class _Exam:
    """Evaluates models by the recipe's protocol, each against the log of the first, which is the retain model."""

    def __init__(self, recipe: Recipe, files: Path, output: Path, console: Console) -> None:
        self._protocol = recipe.evaluate.get("protocol", "open-unlearning")
        self._prompt = {name: recipe.unlearn.get(name) for name in ("system_prompt", "date_string")}
        self._template = recipe.unlearn["template"]
        self._files, self._output, self._console = files, output, console
        self._retain_log: EvalLog | None = None

    def of(self, name: str, folder: Path) -> Examined:
        """Evaluate a model."""
        self._console.print(f"evaluating {name}", highlight=False)
        tokenizer = load_tokenizer(str(folder))
        try:
            result = tofu(
                load_model(str(folder), dtype="float32"),
                tokenizer,
                self._files,
                split=SPLIT,
                protocol=self._protocol,
                retain_log=self._retain_log,
                template=get_template(self._template, tokenizer, **self._prompt),
                output=self._output / name,
            )
        except FloatingPointError as error:
            return Examined(name, str(folder), {}, str(error))
        if self._retain_log is None:
            self._retain_log = result.log
        return Examined(name, str(folder), {key: result.summary[key] for key in _SHOWN if key in result.summary})


def _write(path: Path, value: Any) -> None:
    partial = path.with_name(f"{PARTIAL}{path.name}")
    partial.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
    partial.replace(path)


_COLUMNS = {
    "forget\nquality": "forget_quality",
    "model\nutility": "model_utility",
    "forget:\nprobability": "forget_Q_A_Prob",
    "ROUGE": "forget_Q_A_ROUGE",
    "truth\nratio": "forget_truth_ratio",
    "retain:\nprobability": "retain_Q_A_Prob",
    "ROUGE ": "retain_Q_A_ROUGE",
}
_NOT_HERE = {
    "model": "the models are taught on the spot",
    "forget": "the data are the recipe's own; --data names a folder with TOFU's files",
    "retain": "the data are the recipe's own; --data names a folder with TOFU's files",
    "dry_run": "models and rows are only made when it runs",
    "retain_log": "the retain model is taught and evaluated too",
}


@dataclass
class _Command:
    """The flags that are not of the training itself."""

    recipe: str | None = None
    data: str | None = None
    output_dir: str | None = None
    overwrite: bool = False
    json: bool = False


def run_at(scale: str, words: Sequence[str]) -> int:
    """Run ``efface unlearn`` at a scale; ``words`` are those of its command line and its file of flags but ``--scale``.

    Raises:
        FileExistsError: an output folder that holds other things.
        ValueError: no recipe, or flags that have no meaning at a scale; as ``run_tiny``.
    """
    for name in _NOT_HERE.keys() & given_names(words):
        raise ValueError(f"--scale {scale}: expected no --{hyphens(name)}, because {_NOT_HERE[name]}; drop it")
    values, overrides = SettingsParser("unlearn", (_Command,)).parse_known_args(list(words))
    command = _Command(**vars(values))
    if command.recipe is None:
        raise ValueError(f"--scale {scale}: expected --recipe, a name of `efface recipes`, got none")
    recipe = load_recipe(command.recipe)
    folder = Path(command.output_dir or f"{recipe.name}-{scale}")
    options: dict[str, Any] = {"data": command.data, "overrides": overrides, "overwrite": command.overwrite}
    console = open_console(stderr=True)
    run = run_tiny(recipe, folder, scale=scale, console=console, **options)
    if command.json:
        sys.stdout.write((folder / RECORD).read_text(encoding="utf-8"))
        return 0
    show(run, open_console())
    console.print(f"wrote {folder}", highlight=False, soft_wrap=True)
    return 0


def show(run: TinyRun, console: Console) -> None:
    """Print what changed against the recipe, and the figures of the three models."""
    changed = ", ".join([*(f"{name} {json.dumps(value)}" for name, value in run.changed.items()), *run.overrides])
    console.print(f"{run.recipe} on {run.data}", highlight=False, soft_wrap=True)
    console.print(f"other than the recipe: {changed}", highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for heading in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for model in run.models:
        figures = [model.figures.get(name) for name in _COLUMNS.values()]
        table.add_row(model.name, *("-" if figure is None else f"{figure:.3g}" for figure in figures))
    console.print(table)
    for model in run.models:
        if model.note:
            console.print(f"{model.name}: {model.note}", highlight=False, soft_wrap=True)
    if run.revisions:
        console.print(f"revisions: {', '.join(run.revisions)}", highlight=False, soft_wrap=True)
