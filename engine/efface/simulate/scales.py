"""Runs of recipes with small models on a CPU: the changed settings, the data, and the run itself."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from efface.evaluate import EvalLog, tofu
from efface.files import check_output
from efface.hf.model.loading import load_model, load_tokenizer
from efface.hf.text.templates import get_template
from efface.hf.train.checkpoints import checkpoints
from efface.recipes import Recipe
from efface.simulate.data import SPLIT, Rows, SimulatedData, fame_data, made_up_data, tofu_data
from efface.simulate.run import Progress, SimulatedModel, Simulation, as_json, no_progress, write_record
from efface.simulate.teach import ARCHITECTURES, Size, Teaching, digest, taught

RECORD, REQUEST = "tiny.json", "request.json"
_SHOWN = (
    *("forget_quality", "model_utility"),
    *("forget_truth_ratio", "forget_Q_A_Prob", "forget_Q_A_ROUGE"),
    *("retain_Truth_Ratio", "retain_Q_A_Prob", "retain_Q_A_ROUGE"),
)

# Paged optimizers do not run on a CPU, and half precision has no advantage there.
_CPU_FLAGS = {"dtype": "float32", "bf16": False, "fp16": False, "optim": "adamw_torch"}
# Flags of the recipe that the run replaces with its own models and data.
_PROVIDED = (
    *("model", "revision", "reference_model", "reference_revision"),
    *("forget", "retain", "forget_filter", "retain_filter"),
)


@dataclass(frozen=True)
class Scale:
    """Sizes of a small-scale run."""

    about: str  # description in one line
    forget_authors: int  # most authors to forget: the last ones of TOFU's split
    retain_authors: int  # authors to retain: TOFU's first ones
    asked: int  # most retain rows to evaluate
    world: int  # most real authors, and most world facts
    identities: int  # biographies of the FAME-like set, each in five languages
    size: Size  # size of the models
    teaching: Teaching  # training of the full and the retain model
    defaults: Mapping[str, Any] = field(default_factory=dict)  # flags that the recipe's section `tiny` overrides
    limits: Mapping[str, Any] = field(default_factory=dict)  # flags that override the section `tiny`


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
        about="seconds, to check that everything works; the figures have no meaning",
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
    """Return the scale with a name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SCALES:
        raise ValueError(f"--scale: expected one of {', '.join(SCALES)}, got {name!r}")
    return SCALES[name]


def tiny_flags(recipe: Recipe, scale: Scale) -> dict[str, Any]:
    """Return the flags of ``efface unlearn`` for a recipe at a scale, without those of models and data."""
    kept = {name: value for name, value in recipe.unlearn.items() if name not in _PROVIDED}
    return {**kept, **_CPU_FLAGS, **scale.defaults, **recipe.tiny, **scale.limits}


def tiny_data(recipe: Recipe, scale: Scale, folder: str | Path | None) -> SimulatedData:
    """Return the data of a recipe at a scale.

    A recipe with a forget filter gets made-up biographies. Other recipes get TOFU's rows from ``folder``, or made-up
    authors if ``folder`` is None.

    Raises:
        FileNotFoundError: a file of TOFU is missing in the folder.
        ValueError: as ``tofu_data`` and ``fame_data``.
    """
    if "forget_filter" in recipe.unlearn:
        rule: list[str] = recipe.unlearn["forget_filter"]
        return fame_data(rule, identities=scale.identities, asked=scale.asked, world=scale.world)
    counts = {name: getattr(scale, name) for name in ("forget_authors", "retain_authors", "asked", "world")}
    if folder is None:
        return made_up_data(**counts)
    return tofu_data(folder, recipe.evaluate["split"], **counts)


@dataclass(frozen=True)
class TinyRun:
    """The result of a recipe at a small scale."""

    recipe: str  # name of the recipe
    scale: str  # name of the scale
    data: str  # description of the rows
    flags: dict[str, Any]  # of `efface unlearn`, at this scale
    changed: dict[str, Any]  # the flags that differ from the recipe
    overrides: list[str]  # words of the command line, which override recipe and scale
    models: list[SimulatedModel]  # retain, full and unlearned
    revisions: list[str]  # checkpoints of the unlearned model: values of `--revision` for its folder


Unlearn = Callable[[Mapping[str, Any], Sequence[str], bool], None]
"""Runs ``efface unlearn``. Arguments: flags, words of a command line that override them, True to only check them."""


class _Tiny(Simulation):
    def __init__(
        self,
        recipe: Recipe,
        scale: Scale,
        data: SimulatedData,
        out: Path,
        *,
        unlearn: Callable[[str], None],
        progress: Progress,
        say: Callable[[str], object],
    ) -> None:
        super().__init__(data, out, progress)
        self._recipe, self._scale, self._unlearn, self._say = recipe, scale, unlearn, say
        self._texts = list(data.texts())
        self._retain_log: EvalLog | None = None

    @property
    def revisions(self) -> list[str]:
        return [path.name for _, path in sorted(checkpoints(self.out / "model").items())]

    def teach(self, name: str, rows: Rows) -> SimulatedModel:
        template, bar = self._recipe.unlearn["template"], self.progress(f"training {name}")
        options: dict[str, Any] = {"template": template, "size": self._scale.size, "teaching": self._scale.teaching}
        return SimulatedModel(name, str(taught(rows, self._texts, **options, callbacks=[bar])))

    def forget(self, full: SimulatedModel, way: str) -> SimulatedModel:
        folder, note = self.out / "model", ""
        try:
            self._unlearn(full.folder)
        except FloatingPointError as error:  # divergence is a result too: evaluate the newest checkpoint
            note = str(error)
            self._say(f"{self._recipe.name}: {note}")
            folder /= ["", *self.revisions][-1]
        return SimulatedModel(way, str(folder), note=note)

    def examine(self, model: SimulatedModel) -> SimulatedModel:
        """Evaluate with the recipe's protocol. Forget quality compares with the first evaluated model, retain."""
        if model.note and not self.revisions:
            return model
        self._say(f"evaluating {model.name}")
        tokenizer, recipe = load_tokenizer(model.folder), self._recipe
        prompt = {name: recipe.unlearn.get(name) for name in ("system_prompt", "date_string")}
        try:
            result = tofu(
                load_model(model.folder, dtype="float32"),
                tokenizer,
                self.out / "data",
                split=SPLIT,
                protocol=recipe.evaluate.get("protocol", "open-unlearning"),
                retain_log=self._retain_log,
                template=get_template(recipe.unlearn["template"], tokenizer, **prompt),
                output=self.out / "evaluation" / model.name,
            )
        except FloatingPointError as error:
            return replace(model, note=model.note or str(error))
        self._retain_log = self._retain_log or result.log
        return replace(model, figures={key: result.summary[key] for key in _SHOWN if key in result.summary})


def run_tiny(
    recipe: Recipe,
    output: str | Path,
    *,
    unlearn: Unlearn,
    scale: str = "tiny",
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress = no_progress,
    say: Callable[[str], object] = str,
) -> TinyRun:
    """Run a recipe at a small scale.

    The run writes into ``output``: ``data/`` (its rows, in TOFU's file names), ``model/`` (the unlearned model and its
    checkpoints, as ``efface unlearn`` writes them), ``evaluation/`` (of retain, full and unlearned) and ``tiny.json``.
    The full and retain models are kept in the cache, for all runs on the same rows. A second call with the same
    arguments continues a run that was stopped.

    Args:
        recipe: the recipe.
        output: the output folder.
        unlearn: runs or checks ``efface unlearn``; see ``Unlearn``.
        scale: "tiny" or "smoke".
        data: folder with TOFU's files; None uses made-up authors. Recipes with a forget filter use a FAME-like set.
        overrides: words of the command line, which override the flags of the recipe and of the scale.
        overwrite: start again in a folder with a finished run or other files.
        progress: shows the progress of the training of the full and the retain model.
        say: prints a message.

    Raises:
        FileExistsError: the output folder contains other files, and ``overwrite`` is False.
        FileNotFoundError: a file of TOFU is missing in ``data``.
        ValueError: the recipe's template has no small model, ``data`` is in the output folder, or ``efface unlearn``
            refuses the flags.
    """
    if (template := recipe.unlearn.get("template")) not in ARCHITECTURES:
        raise ValueError(
            f"{recipe.path}: --scale: expected template {', '.join(ARCHITECTURES)}, for which there are small models, "
            f"got {template!r}"
        )
    chosen, output = get_scale(scale), check_output(output, overwrite=True, inputs={"--data": data})
    rows = tiny_data(recipe, chosen, data)
    flags, files = tiny_flags(recipe, chosen), output / "data"
    provided = {"forget": files / "forget.json", "retain": files / "retain.json", "output_dir": output / "model"}

    def forget(full: str, *, check: bool = False) -> None:
        unlearn({**flags, **provided, "model": full, "overwrite": overwrite}, overrides, check)

    forget("taught", check=True)  # raises for invalid flags before the models are trained
    request = {
        "recipe": recipe.name,
        "scale": asdict(chosen),
        "flags": flags,
        "overrides": list(overrides),
        "data": rows.name,
        "rows": digest(rows.files),
    }
    _begin(output, as_json(request), overwrite=overwrite)
    say(f"{recipe.name} at scale {scale}: {rows.name}")
    rows.write(files)
    tiny = _Tiny(recipe, chosen, rows, output, unlearn=forget, progress=progress, say=say)
    run = TinyRun(
        models=tiny.run(["unlearned"]),
        recipe=recipe.name,
        scale=scale,
        data=rows.name,
        flags=flags,
        changed={name: value for name, value in flags.items() if recipe.unlearn.get(name) != value},
        overrides=list(overrides),
        revisions=tiny.revisions,
    )
    write_record(output / RECORD, {**asdict(run), "sizes": asdict(chosen)})
    return run


def _begin(output: Path, request: dict[str, Any], *, overwrite: bool) -> None:
    """Record the run in ``request.json``, so that only the same run continues in the folder.

    Raises:
        FileExistsError: the folder contains other files, and ``overwrite`` is False.
    """
    try:
        known = json.loads((output / REQUEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        known = None
    if known != request:
        check_output(output, overwrite=overwrite)
        write_record(output / REQUEST, request)
