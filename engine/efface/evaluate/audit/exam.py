"""An exam: a model, and how it is asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from efface.evaluate.audit.probe import Probe
from efface.evaluate.generation import GenerationTask
from efface.evaluate.likelihood import AnswerTask, mean_logprobs
from efface.evaluate.runner import Progress, run_tasks
from efface.evaluate.sampling import Sampling
from efface.evaluate.task import RowResult, Task
from efface.hf.templates import AUTO, Template


@dataclass(frozen=True)
class Exam:
    """A model, and how it is asked.

    Attributes:
        model: an ``AutoModelForCausalLM``.
        tokenizer: its tokenizer.
        template: prompt format; see ``efface.hf.templates``.
        max_new_tokens: of a generation.
        token_budget: tokens of a forward pass.
        store: for ``run_tasks``.
        progress: likewise.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: str | Template = AUTO
    max_new_tokens: int = 200
    token_budget: int = 8192
    store: str | Path | None = None
    progress: Progress | None = None

    def generate(self, probes: Sequence[Probe], sampling: Sampling | None = None) -> list[list[str]]:
        """Return the model's generations for each probe: the greedy one, or as many as are sampled."""
        if not probes:
            return []
        task = GenerationTask(
            self.tokenizer,
            [_conversation(probe.turns) for probe in probes],
            template=self.template,
            max_new_tokens=self.max_new_tokens,
            token_budget=self.token_budget,
            sampling=sampling,
        )
        return [[result["text"]] if sampling is None else result["texts"] for result in self._run(task)]

    def mean_logprobs(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return the mean token log-probability of each answer, given its question."""
        task = AnswerTask(self.tokenizer, questions, answers, template=self.template, token_budget=self.token_budget)
        return mean_logprobs(self._run(task))

    def _run(self, task: Task) -> list[RowResult]:
        (results,) = run_tasks(self.model, [task], store=self.store, progress=self.progress)
        return results


def _conversation(turns: Sequence[str]) -> list[dict[str, str]]:
    """Return the turns as a chat: user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
