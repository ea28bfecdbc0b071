"""A recipe at a size for a CPU: what that changes in its settings, and its run."""

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

# A CPU has no paged optimizer, and gains nothing from half precision.
_ON_A_CPU = {"dtype": "float32", "bf16": False, "fp16": False, "optim": "adamw_torch"}
# What the scale provides: models taught on the spot, and rows for them.
_PROVIDED = (
    *("model", "revision", "reference_model", "reference_revision"),
    *("forget", "retain", "forget_filter", "retain_filter"),
)


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    about: str  # one line
    forget_authors: int  # at most, of TOFU's split; the last ones
    retain_authors: int  # TOFU's first ones
    asked: int  # retain rows that are evaluated, at most
    world: int  # real authors, and world facts, each at most
    identities: int  # of the FAME-like set, each in five languages
    size: Size  # of the models
    teaching: Teaching  # of full and retain
    defaults: Mapping[str, Any] = field(default_factory=dict)  # flags unless the recipe's `tiny` says otherwise
    limits: Mapping[str, Any] = field(default_factory=dict)  # flags whatever it says


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


def tiny_data(recipe: Recipe, scale: Scale, folder: str | Path | None) -> SimulatedData:
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


@dataclass(frozen=True)
class TinyRun:
    """What a recipe did at a small scale."""

    recipe: str  # its name
    scale: str  # the scale's
    data: str  # what the rows are
    flags: dict[str, Any]  # of `efface unlearn`, at this scale
    changed: dict[str, Any]  # those of them that differ from the recipe's
    overrides: list[str]  # words of the command line that won over both
    models: list[SimulatedModel]  # retain, full and unlearned
    revisions: list[str]  # checkpoints of the unlearned model, which `--revision` of its folder takes


Unlearn = Callable[[Mapping[str, Any], Sequence[str], bool], None]
"""Trains as the flags of ``efface unlearn`` and the words that win over them say; True checks them alone."""


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
        template, bar = self._recipe.unlearn["template"], self.progress(f"teaching {name}")
        options: dict[str, Any] = {"template": template, "size": self._scale.size, "teaching": self._scale.teaching}
        return SimulatedModel(name, str(taught(rows, self._texts, **options, callbacks=[bar])))

    def forget(self, full: SimulatedModel, way: str) -> SimulatedModel:
        folder, note = self.out / "model", ""
        try:
            self._unlearn(full.folder)
        except FloatingPointError as error:  # a collapse is a result: the newest checkpoint shows how far it was
            note = str(error)
            self._say(f"{self._recipe.name}: {note}")
            folder /= ["", *self.revisions][-1]
        return SimulatedModel(way, str(folder), note=note)

    def examine(self, model: SimulatedModel) -> SimulatedModel:
        """Evaluate by the recipe's protocol, against the log of the first model."""
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

    ``output`` gets ``data/`` (what it ran on, in TOFU's names), ``model/`` (the unlearned model and its checkpoints, as
    ``efface unlearn`` writes them), ``evaluation/`` (of retain, full and unlearned) and ``tiny.json``. The taught
    models stay in the cache, for every run on the same rows. A run that was stopped continues when it is asked for
    again.

    Args:
        recipe: see ``efface.recipes``.
        output: folder.
        unlearn: what ``efface unlearn`` does.
        scale: "tiny" or "smoke".
        data: a folder with TOFU's files; None makes authors up. Recipes that forget by a filter get a FAME-like set.
        overrides: words of the command line that win over the recipe's and the scale's flags.
        overwrite: begin anew in a folder that holds a finished run.
        progress: of teaching.
        say: is told what happens.

    Raises:
        FileExistsError: an output folder that holds other things, without ``overwrite``.
        FileNotFoundError: a data folder without TOFU's files.
        ValueError: a recipe that has no tiny form, ``data`` in the output folder, or whatever ``efface unlearn``
            refuses.
    """
    if (template := recipe.unlearn.get("template")) not in ARCHITECTURES:
        raise ValueError(
            f"{recipe.path}: --scale: expected template {', '.join(ARCHITECTURES)}, which say what a small model is "
            f"like, got {template!r}"
        )
    chosen, output = get_scale(scale), check_output(output, overwrite=True, inputs={"--data": data})
    rows = tiny_data(recipe, chosen, data)
    flags, files = tiny_flags(recipe, chosen), output / "data"
    provided = {"forget": files / "forget.json", "retain": files / "retain.json", "output_dir": output / "model"}

    def forget(full: str, *, check: bool = False) -> None:
        unlearn({**flags, **provided, "model": full, "overwrite": overwrite}, overrides, check)

    forget("taught", check=True)  # what is wrong must not show when the models are taught
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
    """Note what the folder is for, so that the same run continues there and another one does not.

    Raises:
        FileExistsError: a folder that holds other things, without ``overwrite``.
    """
    try:
        known = json.loads((output / REQUEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        known = None
    if known != request:
        check_output(output, overwrite=overwrite)
        write_record(output / REQUEST, request)
