"""Relearning: what comes back when a model is taught a small share of what it forgot."""

import contextlib
import itertools
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from efface.evaluate.audit.rows import AuditRow
from efface.evaluate.audit.view import Exam, Figures, Probe, View, summary
from efface.evaluate.runner import RowResult
from efface.hf.model.lora import with_fresh_lora
from efface.hf.model.supported import undisturbed
from efface.hf.text.templates import encode
from efface.hf.train.arguments import UnlearnArguments
from efface.hf.train.trainer import FinetuneTrainer

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class Relearn(View):
    """Fine-tune on a share of the rows, and ask the questions of all others before and after.

    The model is as it was when the view is done, bit for bit; see ``unchanged``. Retraining on T
    (RTT, arXiv 2410.08827), with rows of the same authors on both sides.

    Attributes:
        share: of the rows that are taught, drawn by the seed; at least one, never all.
        steps: optimizer steps.
        batch: rows of a step.
        learning_rate: constant.
        lora_r: rank, to train an adapter instead of all weights; needs peft, and less memory. A model with adapters
            keeps them, frozen, beside it.
        seed: of the draw and of the training.
    """

    share: float = 0.1
    steps: int = 20
    batch: int = 8
    learning_rate: float = 2e-5
    lora_r: int | None = None
    seed: int = 0
    name: ClassVar[str] = "relearn"

    def __post_init__(self) -> None:
        """Check the settings."""
        if not 0 < self.share < 1:
            raise ValueError(f"`share`: expected between 0 and 1, both excluded, got {self.share}")
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"`steps`, `batch`: expected at least 1, got {self.steps}, {self.batch}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"`learning_rate`: expected a positive number, got {self.learning_rate}")
        if self.lora_r is not None and self.lora_r < 1:
            raise ValueError(f"`lora_r`: expected at least 1, got {self.lora_r}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed`: expected 0 .. {2**32 - 1}, got {self.seed}")

    def taught(self, rows: Sequence[AuditRow]) -> list[int]:
        """Return the numbers of the rows that are taught, in order."""
        if len(rows) < 2:
            raise ValueError(f"view 'relearn': expected at least 2 rows, one to teach and one to ask, got {len(rows)}")
        count = min(max(1, round(self.share * len(rows))), len(rows) - 1)
        draw = np.random.Generator(np.random.Philox(self.seed))
        return sorted(draw.choice(len(rows), count, replace=False).tolist())

    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return a probe for each row that is not taught; it is asked twice."""
        taught = set(self.taught(rows))
        return [Probe(i, (row.question,), row.answer, row.language) for i, row in enumerate(rows) if i not in taught]

    def run(self, exam: Exam, rows: Sequence[AuditRow]) -> list[RowResult]:
        """Ask, teach, and ask again."""
        before = super().run(exam, rows)
        with self._taught(exam, [rows[i] for i in self.taught(rows)]) as taught:
            after = super().run(taught, rows)
        return [{**record, "label": BEFORE} for record in before] + [{**record, "label": AFTER} for record in after]

    def figures(self, records: Sequence[RowResult]) -> Figures:
        """Return the summary after relearning, with the mean before, and the gain."""
        after, before = (
            summary([record for record in records if record["label"] == label], by_label=False)
            for label in (AFTER, BEFORE)
        )
        gain = None if after["mean"] is None else after["mean"] - before["mean"]
        return {**after, "before": before["mean"], "gain": gain}

    def shown(self, figures: Figures) -> dict[str, float | None]:
        """Return the mean after relearning, and what it was before."""
        return {"": figures["mean"], BEFORE: figures["before"]}

    @contextlib.contextmanager
    def _taught(self, exam: Exam, rows: Sequence[AuditRow]) -> Iterator[Exam]:
        """Hand out the exam of the model as it is after training on the rows."""
        questions, answers = [row.question for row in rows], [row.answer for row in rows]
        store = encode(exam.tokenizer, questions, answers, template=exam.template)
        with unchanged(exam.model):
            model: Any = exam.model
            if self.lora_r is None:
                model.requires_grad_(True)
            else:
                model = with_fresh_lora(model, r=self.lora_r)
            with tempfile.TemporaryDirectory() as nothing:  # a trainer makes its folder at once
                trainer = FinetuneTrainer(model, self._arguments(nothing, exam), data=store)
                trainer.remove_callback(transformers.PrinterCallback)
                trainer.train()
            yield replace(exam, model=model)

    def _arguments(self, folder: str, exam: Exam) -> UnlearnArguments:
        return UnlearnArguments(
            output_dir=folder,
            max_steps=self.steps,
            pairs_per_step=self.batch,
            token_budget=exam.token_budget,
            learning_rate=self.learning_rate,
            lr_scheduler_type="constant",
            seed=self.seed,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
            use_cpu=exam.model.device.type == "cpu",
        )


@contextlib.contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Undo what the block does to weights, buffers, gradients, modes, attributes, classes, layers and the attention.

    The random-number generators are afterwards what they were, too.

    Weights and buffers wait in main memory, once each, and are copied back into their place; nothing is written to
    disk. Whatever else holds them (tied weights, a wrapper) sees the old values again. Adapters that the block adds are
    gone afterwards, and those that were there are what they were, down to which are active. Afterwards the model is as
    it was also if the block raises.
    """
    saved = [
        (tensor, tensor.detach().to("cpu", copy=True))
        for tensor in itertools.chain(model.parameters(), model.buffers())
    ]
    trained = [(weight, weight.requires_grad, weight.grad) for weight in model.parameters()]
    modules = [(module, type(module), _contents(vars(module))) for module in model.modules()]
    caching = getattr(model.config, "use_cache", None)
    attention, device = model.config._attn_implementation, model.device  # noqa: SLF001
    try:
        with undisturbed(model):
            yield
    finally:
        for module, own, attributes in modules:
            module.__class__ = own
            _restore(vars(module), attributes)
        model.set_attn_implementation(attention)
        if caching is not None:  # a Trainer switches it off
            model.config.use_cache = caching
        model.to(device)  # type: ignore[arg-type]
        with torch.no_grad():
            for tensor, before in saved:
                tensor.copy_(before)
        for weight, flag, grad in trained:
            weight.requires_grad_(flag)
            weight.grad = grad


def _contents(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return a module's attributes, each with a copy of what it holds if it is a dict, a list or a set."""
    return {
        name: (value, value.copy() if isinstance(value, (dict, list, set)) else None)
        for name, value in attributes.items()
    }


def _restore(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    """Undo every change, within containers too, which others may hold as well."""
    attributes.clear()
    for name, (value, held) in before.items():
        attributes[name] = value
        if isinstance(value, list):
            value[:] = held
        elif isinstance(value, (dict, set)):
            value.clear()
            value.update(held)
