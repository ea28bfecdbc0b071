"""How the result of a recipe is judged."""

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
    """Raise ValueError where a run forgets something else than what the recipe's evaluation asks about."""
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
                f"--{hyphens(flag)}: recipe {recipe.name} evaluates on {split}, which is not what "
                f"{getattr(command, flag)!r} forgets; add --evaluate False, and evaluate the result with "
                "`efface evaluate`"
            )


def check_files(command: UnlearnCommand, recipe: Recipe) -> None:
    """Raise what the evaluation would say of its local files: before the training, not after it.

    Raises:
        FileNotFoundError: a log, or a file of the benchmark, that is not there.
        ValueError: one that holds something else.
    """
    asked = recipe.evaluate
    if asked["benchmark"] != "tofu":
        return
    from efface.evaluate.logs import SPLITS, read_log  # noqa: PLC0415 - needs the extra "evaluate"
    from efface.evaluate.protocol import get_protocol  # noqa: PLC0415
    from efface.evaluate.tofu_evaluation import load_split  # noqa: PLC0415

    if command.retain_log is not None:
        read_log(command.retain_log).rows("forget", "truth_ratio")
    if command.data is not None:
        protocol = get_protocol(asked.get("protocol", "open-unlearning"))
        for split in SPLITS:
            load_split(command.data, split, asked["split"], protocol)


def check_sets(command: UnlearnCommand) -> None:
    """Raise ValueError where TOFU's forget and retain sets share rows: forget10 and retain95 do, by 5 %.

    Files are compared row by row, once they are read (``efface.hf.text.data``); this is about names on the Hub.
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
    """Return what a set is called: of a file its name, of a Hub data set its configuration."""
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
    """Evaluate a model as a recipe says, and return the figures by open-unlearning's names; none without a benchmark.

    Args:
        model: the unlearned model.
        tokenizer: its tokenizer.
        recipe: whose ``evaluate`` section counts.
        output: folder for the results; those of the retain model, where the recipe names one, go into a folder there.
        data: folder with the benchmark's files; None is what the recipe says.
        retain_log: evaluation log of a retain model; None is the recipe's, or that of its retain model.
        template: the prompt format of the run.
        compat: of the recipe's protocol; see ``TofuEvaluation``.
        progress: see ``run_tasks``.
    """
    asked = recipe.evaluate
    if asked["benchmark"] == "none":
        return {}
    from efface.evaluate import tofu  # noqa: PLC0415 - needs the extra "evaluate"

    options: dict[str, Any] = {
        "split": asked["split"],
        "protocol": asked.get("protocol", "open-unlearning"),
        "template": template,
        "compat": compat,
        "progress": progress,
    }
    source = data or asked.get("data")
    log: Any = retain_log or asked.get("retain_log")
    if log is None and "retain_model" in asked:
        log = _log_of(asked["retain_model"], model, source, output / "retain_model", options)
    summary = tofu(model, tokenizer, source, retain_log=log, output=output, **options).summary
    return dict(summary)


def _log_of(name: str, beside: Any, source: str | None, output: Path, options: dict[str, Any]) -> Any:
    """Return the log of the retain model, run where and as ``beside`` is; None, with a warning, if it cannot be had."""
    failure: str | None = None
    try:
        model = load_model(name, dtype=str(beside.dtype).removeprefix("torch.")).to(beside.device)
        tokenizer = load_tokenizer(name)
    except OSError as error:
        failure = str(error)
    # All processes evaluate it, or none: those that could would wait for the others.
    failure = next(filter(None, gather_object([failure])), None)
    if failure is not None:
        _LOG.warning("no forget quality: the retain model %s cannot be loaded (%s); give --retain-log", name, failure)
        return None
    if _architecture(model) != _architecture(beside):
        _LOG.warning("no forget quality: the retain model %s is of another architecture; give --retain-log", name)
        return None
    from efface.evaluate import tofu  # noqa: PLC0415 - needs the extra "evaluate"

    return tofu(model, tokenizer, source, output=output, **options).log


def _architecture(model: Any) -> tuple[Any, ...]:
    config = extract_model_from_parallel(model).config.get_text_config()
    return tuple(getattr(config, name, None) for name in ("model_type", "hidden_size", "num_hidden_layers"))
