"""Evaluation of the result of a recipe, and checks of its settings and files before the training."""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import extract_model_from_parallel, gather_object

from efface.extras import check_extras
from efface.flags import hyphens
from efface.hf.model.loading import load_model, load_tokenizer
from efface.hf.text.templates import AUTO, Template
from efface.recipes.command import UnlearnCommand
from efface.recipes.recipe import Recipe, file_stem, local_source

if TYPE_CHECKING:
    from efface.evaluate.runner import Progress

_LOG = logging.getLogger(__name__)
_SHARE = re.compile(r"(forget|retain)(\d\d)")


def check_evaluation(command: UnlearnCommand, recipe: Recipe) -> None:
    """Check that the evaluation of a recipe fits the run and can be imported.

    Raises:
        ImportError: the packages of the evaluation are not installed.
        ValueError: the run forgets another set than the one that the recipe evaluates.
    """
    if recipe.evaluate["benchmark"] != "none":
        check_extras(f"the evaluation of recipe {recipe.name}", "evaluate", remedy="add --evaluate False")
    split = recipe.evaluate.get("split")
    if split is None:
        return
    forget = str(recipe.unlearn["forget"])
    if command.data is not None:
        forget = local_source(forget, command.data, "--forget")
    same = command.forget == forget or stem(command.forget) == split
    for flag, right in (
        ("forget", same),
        ("forget_filter", command.forget_filter == recipe.unlearn.get("forget_filter")),
    ):
        if not right:
            raise ValueError(
                f"--{hyphens(flag)}: expected the forget set {split}, which recipe {recipe.name} evaluates, got "
                f"{getattr(command, flag)!r}; add --evaluate False, and evaluate the result with "
                "`efface evaluate`"
            )


def check_files(command: UnlearnCommand, recipe: Recipe) -> None:
    """Read the local files of the evaluation, so that their errors are raised before the training.

    Raises:
        FileNotFoundError: a log or a file of the benchmark does not exist.
        ValueError: a file has other contents.
    """
    settings = recipe.evaluate
    if settings["benchmark"] != "tofu":
        return
    from efface.evaluate.logs import SPLITS, read_log  # noqa: PLC0415 - needs the extra "evaluate"
    from efface.evaluate.protocol import get_protocol  # noqa: PLC0415
    from efface.evaluate.tofu_evaluation import load_split  # noqa: PLC0415

    if command.retain_log is not None:
        read_log(command.retain_log).rows("forget", "truth_ratio")
    if command.data is not None:
        protocol = get_protocol(settings.get("protocol", "open-unlearning"))
        for split in SPLITS:
            load_split(command.data, split, settings["split"], protocol)


def check_sets(command: UnlearnCommand) -> None:
    """Raise ValueError if the names of TOFU's forget and retain splits imply shared rows.

    For example, forget10 and retain95 share 5 % of TOFU. This function compares only names of Hub data sets.
    ``efface.hf.text.data`` compares local files row by row after it has read them.
    """
    sources = [source or "" for source in (command.forget, command.retain)]
    if any(Path(source).expanduser().exists() for source in sources):
        return
    forget, retain = (_SHARE.fullmatch(stem(source)) for source in sources)
    if forget and retain and forget[1] == "forget" and retain[1] == "retain":
        both = int(forget[2]) + int(retain[2]) - 100
        if both > 0 and not (command.forget_filter or command.retain_filter):
            raise ValueError(
                f"--forget {command.forget} and --retain {command.retain}: expected sets without a common row, got "
                f"{both} % of TOFU in both; give --retain with retain{100 - int(forget[2]):02d}"
            )


def stem(source: str) -> str:
    """Return the name of a set: the stem of a file, or the configuration of a Hub data set."""
    return file_stem(source) if ":" in source else Path(source).stem


def evaluate_recipe(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    output: Path,
    *,
    data: str | None = None,
    retain_log: str | None = None,
    template: str | Template = AUTO,
    compat: str | None = None,
    progress: "Progress | None" = None,
) -> dict[str, float]:
    """Evaluate a model with the benchmark of a recipe.

    Args:
        model: the unlearned model.
        tokenizer: its tokenizer.
        recipe: the recipe; its ``evaluate`` section is used.
        output: folder for the results. Results of the recipe's retain model go into its folder ``retain_model``.
        data: folder with the benchmark's files; None uses the recipe's.
        retain_log: evaluation log of a retain model; None uses the recipe's log or evaluates its retain model.
        template: the prompt format of the run.
        compat: compatibility mode of the recipe's protocol; see ``TofuEvaluation``.
        progress: callback; see ``run_tasks``.

    Returns:
        The figures by open-unlearning's names; empty if the benchmark is "none".
    """
    settings = recipe.evaluate
    if settings["benchmark"] == "none":
        return {}
    from efface.evaluate import tofu  # noqa: PLC0415 - needs the extra "evaluate"

    options: dict[str, Any] = {
        "split": settings["split"],
        "protocol": settings.get("protocol", "open-unlearning"),
        "template": template,
        "compat": compat,
        "progress": progress,
    }
    source = data or settings.get("data")
    log: Any = retain_log or settings.get("retain_log")
    if log is None and "retain_model" in settings:
        log = _log_of(settings["retain_model"], model, source, output / "retain_model", options)
    summary = tofu(model, tokenizer, source, retain_log=log, output=output, **options).summary
    return dict(summary)


def _log_of(name: str, unlearned: Any, source: str | None, output: Path, options: dict[str, Any]) -> Any:
    """Evaluate the retain model ``name`` on the device and in the dtype of ``unlearned``, and return its log.

    Returns None, with a warning, if the model cannot be loaded or has another architecture.
    """
    failure: str | None = None
    try:
        model = load_model(name, dtype=str(unlearned.dtype).removeprefix("torch.")).to(unlearned.device)
        tokenizer = load_tokenizer(name)
    except OSError as error:
        failure = str(error)
    # If loading failed in one process, no process evaluates: the others would wait for it forever.
    failure = next(filter(None, gather_object([failure])), None)
    if failure is not None:
        _LOG.warning("no forget quality: the retain model %s cannot be loaded (%s); give --retain-log", name, failure)
        return None
    if _architecture(model) != _architecture(unlearned):
        _LOG.warning("no forget quality: the retain model %s has another architecture; give --retain-log", name)
        return None
    from efface.evaluate import tofu  # noqa: PLC0415 - needs the extra "evaluate"

    return tofu(model, tokenizer, source, output=output, **options).log


def _architecture(model: Any) -> tuple[Any, ...]:
    config = extract_model_from_parallel(model).config.get_text_config()
    return tuple(getattr(config, name, None) for name in ("model_type", "hidden_size", "num_hidden_layers"))
