"""A trainer that knows its recipe: what it writes carries a card, and checkpoints may become revisions."""

import copy
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from transformers.trainer_utils import TrainOutput

from efface.hf.arguments import UnlearnArguments
from efface.hf.checkpoints import ResumableTrainer
from efface.hf.hub import HubClient, RevisionPusher
from efface.hf.model_card import model_card
from efface.hf.recipe import (
    DataFacts,
    Recipe,
    argument_values,
    changed_arguments,
    objective_values,
    plan_values,
    versions,
)
from efface.objectives import Objective


class CardedTrainer(ResumableTrainer):
    """Adds model cards, and branches of a Hub repository, to exact checkpoints.

    Attributes:
        objective: whose parameters the card lists.
        data: of what the sets were made, by role.
        pairs_per_step: pairs of an optimizer step, on all processes together.
        base_model: the name of the model before training.
        revision: of the base model.
        adapter: in words, which adapter is trained on what, and what is saved; None without one.
        command: the command line that started the run, if one did.
        reference_kind: "cached" or "live", for objectives with a reference.
        not_pushed: after ``train()``, the errors of checkpoints that are not on the Hub, by step.
    """

    objective: Objective | None
    pairs_per_step: int
    revision = "main"
    adapter: str | None = None
    command: str | None = None
    reference_kind: str | None = None
    _saved = False  # while what is in the output folder is pushed: it need not be written again

    def __init__(self, *, args: UnlearnArguments, hub_client: HubClient | None = None, **options: Any) -> None:
        self.pusher: RevisionPusher | None = None
        self.not_pushed: dict[int, str] = {}
        self._revisions = args.revision_per_checkpoint
        if self._revisions:
            if args.process_index == 0:
                self.pusher = RevisionPusher.of(args, hub_client)
            args = copy.copy(args)
            args.push_to_hub = False  # else transformers pushes too, to main
        super().__init__(args=args, **options)
        self.data: dict[str, DataFacts] = {}
        model: Any = self.model
        self.base_model: str = getattr(model.config, "_name_or_path", "") or type(model).__name__

    def recipe(self) -> Recipe:
        """Return what the model of this run is made of."""
        args: UnlearnArguments = self.args  # type: ignore[assignment]
        return Recipe(
            base_model=self.base_model,
            revision=self.revision,
            method="finetune" if self.objective is None else self.objective.name,
            objective=objective_values(self.objective),
            reference=self.reference_kind,
            data=self.data,
            plan=plan_values(args, self.pairs_per_step),
            arguments=changed_arguments(argument_values(args)),
            command=self.command,
            processes=args.world_size,
            versions=versions(),
            adapter=self.adapter,
        )

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **options: Any) -> TrainOutput:  # type: ignore[override]
        """See ``ResumableTrainer.train``; ends when the checkpoints are on the Hub, or are in ``not_pushed``."""
        if self.pusher is not None and resume_from_checkpoint:
            self.pusher.resume()
        elif self.pusher is not None:
            self.pusher.start_anew()
        output = super().train(resume_from_checkpoint, **options)
        if self.pusher is not None:
            self.not_pushed = self.pusher.finish()
        return output

    def on_checkpoint(self, checkpoint: Path) -> None:
        """Push it, if each is to be a revision."""
        if self.pusher is not None:
            self.pusher.add(self.state.global_step, checkpoint)

    def checkpoints_in_use(self) -> AbstractSet[Path]:
        """Return those that are not pushed yet."""
        return set() if self.pusher is None else self.pusher.in_use()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, its tokenizer, and a card (README.md)."""
        if self._saved and output_dir is None:
            return
        super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:
            self._write_card(Path(output_dir or str(self.args.output_dir)))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write our card where transformers would write its own."""
        if self.is_world_process_zero():
            self._write_card(Path(str(self.args.output_dir)))

    def push_to_hub(self, *args: Any, saved: bool = False, **kwargs: Any) -> Any:
        """Push the model; where checkpoints are revisions, to main of the same repository.

        With ``saved`` it is in the output folder already, and is not written again: killed meanwhile, it stays whole.
        """
        self._saved = saved
        try:
            if not self._revisions:
                return super().push_to_hub(*args, **kwargs)
            self.save_model(_internal_call=True)
            if self.pusher is not None:
                self.pusher.push_final(Path(str(self.args.output_dir)))
            return None
        finally:
            self._saved = False

    def _write_card(self, folder: Path) -> None:
        if folder.is_dir():
            model_card(self.recipe(), self.state.log_history, step=self.state.global_step).save(folder / "README.md")
