"""The relearning view: fine-tunes a model on a small share of the forgotten rows and asks about the others."""

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
    """Fine-tune on a share of the rows, and ask the questions of all other rows before and after.

    Afterwards, the model is restored bit for bit; see ``unchanged``. The method is Retraining on T (RTT, arXiv
    2410.08827), with rows of the same authors among the trained and the tested rows.

    Attributes:
        share: share of the rows to train on, drawn with the seed; at least one row, never all.
        steps: number of optimizer steps.
        batch: rows per step.
        learning_rate: the constant learning rate.
        lora_r: rank of a LoRA adapter to train instead of all weights. It requires peft and uses less memory. Adapters
            that the model already has stay active and frozen. None trains all weights.
        seed: seed of the draw and of the training.
    """

    share: float = 0.1
    steps: int = 20
    batch: int = 8
    learning_rate: float = 2e-5
    lora_r: int | None = None
    seed: int = 0
    name: ClassVar[str] = "relearn"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"`share`: expected between 0 and 1 (exclusive), got {self.share}")
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"`steps`, `batch`: expected at least 1, got {self.steps}, {self.batch}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"`learning_rate`: expected a positive number, got {self.learning_rate}")
        if self.lora_r is not None and self.lora_r < 1:
            raise ValueError(f"`lora_r`: expected at least 1, got {self.lora_r}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed`: expected 0 .. {2**32 - 1}, got {self.seed}")

    def taught(self, rows: Sequence[AuditRow]) -> list[int]:
        """Return the numbers of the rows to train on, in ascending order."""
        if len(rows) < 2:
            raise ValueError(
                f"view 'relearn': expected at least 2 rows, one to train on and one to ask, got {len(rows)}; add rows "
                "or leave the view out"
            )
        count = min(max(1, round(self.share * len(rows))), len(rows) - 1)
        draw = np.random.Generator(np.random.Philox(self.seed))
        return sorted(draw.choice(len(rows), count, replace=False).tolist())

    def probes(self, rows: Sequence[AuditRow]) -> list[Probe]:
        """Return one probe per row that is not trained on. Each is run before and after the training."""
        taught = set(self.taught(rows))
        return [Probe(i, (row.question,), row.answer, row.language) for i, row in enumerate(rows) if i not in taught]

    def run(self, exam: Exam, rows: Sequence[AuditRow]) -> list[RowResult]:
        """Run the probes, fine-tune the model, run the probes again, and restore the model."""
        before = super().run(exam, rows)
        with self._fine_tuned(exam, [rows[i] for i in self.taught(rows)]) as fine_tuned:
            after = super().run(fine_tuned, rows)
        return [{**record, "label": BEFORE} for record in before] + [{**record, "label": AFTER} for record in after]

    def figures(self, records: Sequence[RowResult]) -> Figures:
        """Return the summary after relearning, with the mean ``before`` and the ``gain``."""
        after, before = (
            summary([record for record in records if record["label"] == label], by_label=False)
            for label in (AFTER, BEFORE)
        )
        gain = None if after["mean"] is None else after["mean"] - before["mean"]
        return {**after, "before": before["mean"], "gain": gain}

    def shown(self, figures: Figures) -> dict[str, float | None]:
        """Return the mean novel recall after and before relearning."""
        return {"": figures["mean"], BEFORE: figures["before"]}

    @contextlib.contextmanager
    def _fine_tuned(self, exam: Exam, rows: Sequence[AuditRow]) -> Iterator[Exam]:
        """Yield ``exam`` with the model fine-tuned on the rows. Restore the model afterwards."""
        questions, answers = [row.question for row in rows], [row.answer for row in rows]
        store = encode(exam.tokenizer, questions, answers, template=exam.template)
        with unchanged(exam.model):
            model: Any = exam.model
            if self.lora_r is None:
                model.requires_grad_(True)
            else:
                model = with_fresh_lora(model, r=self.lora_r)
            with tempfile.TemporaryDirectory() as folder:  # a trainer creates its output folder at once
                trainer = FinetuneTrainer(model, self._arguments(folder, exam), data=store)
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
    """Restore the model after the block, bit for bit, even if the block raises.

    This covers weights, buffers, gradients, modes, attributes, classes, layers and the attention implementation of the
    model, and the states of the random-number generators.

    One copy of each weight and buffer is kept in main memory and copied back in place; nothing is written to disk.
    Because the restore is in place, other references to the weights (tied weights, a wrapper) see the old values again.
    Adapters that the block adds are removed. Existing adapters are restored, including which of them are active.
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
        if caching is not None:  # the Trainer sets use_cache to False
            model.config.use_cache = caching
        model.to(device)  # type: ignore[arg-type]
        with torch.no_grad():
            for tensor, before in saved:
                tensor.copy_(before)
        for weight, flag, grad in trained:
            weight.requires_grad_(flag)
            weight.grad = grad


def _contents(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return a module's attributes, each with a shallow copy if it is a dict, a list or a set."""
    return {
        name: (value, value.copy() if isinstance(value, (dict, list, set)) else None)
        for name, value in attributes.items()
    }


def _restore(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    """Restore the attributes. Containers are restored in place, because other objects can refer to them."""
    attributes.clear()
    for name, (value, held) in before.items():
        attributes[name] = value
        if isinstance(value, list):
            value[:] = held
        elif isinstance(value, (dict, set)):
            value.clear()
            value.update(held)
