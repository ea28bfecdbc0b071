"""``EpochPlanner``: the plans of a run's epochs, and whether its micro-batches store shared tokens once."""

import warnings
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from efface.batching.pack import packed_size
from efface.batching.plan import EpochPlan, RetainSampling, plan_epoch
from efface.batching.prefixes import AddedTokens, added_tokens
from efface.batching.store import TokenStore

WORTH_SHARING = 1 / 32
"""Share of the tokens that sharing has to save: reading keys along paths has a cost too."""

_MEASURED = 16  # micro-batches in which the saved tokens are measured


class Packing(TypedDict):
    """The options of ``pack_items`` that decide which tokens are stored."""

    share: bool
    last_tokens: bool


class EpochPlanner:
    """The plans of a run's epochs.

    Args:
        stores: the forget store, the retain store and, if the objective uses alternate answers, the alternate store.
        share: store tokens that the sequences of a micro-batch share only once, if that saves at least 1/32 of the
            tokens of the first micro-batches.
        last_tokens: with shared tokens, include the last token of each sequence, which predicts nothing. Without, it is
            always included.
        pairs_per_step: see ``plan_epoch``, as for the following arguments.
        token_budget: maximum number of tokens of a micro-batch, counted as by ``added_tokens``.
        world_size: number of ranks.
        seed: seed of the plans.
        retain_sampling: how retain sequences are drawn.
        drop_last: whether to leave out a last step with fewer pairs.

    Attributes:
        packing: the options with which micro-batches are packed.
        added: the tokens that sequences add to micro-batches.
        saved: share of the tokens of the first micro-batches that are saved by sharing, 0 .. 1.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        *,
        share: bool = False,
        last_tokens: bool = True,
        pairs_per_step: int,
        token_budget: int,
        world_size: int = 1,
        seed: int,
        retain_sampling: RetainSampling = "random",
        drop_last: bool = False,
    ) -> None:
        self.stores = tuple(stores)
        self._last_tokens = last_tokens
        self._pairs_per_step, self._token_budget, self._world_size = pairs_per_step, token_budget, world_size
        self._seed, self._retain_sampling, self._drop_last = seed, retain_sampling, drop_last
        self._share(share)
        if share:
            with warnings.catch_warnings(record=True) as caught:  # warnings of a plan that may not be used
                warnings.simplefilter("always")
                plan = self.plan(0)
            stored, full = self.tokens(plan, batches=_MEASURED)
            self.saved = 1 - stored / full
            if self.saved < WORTH_SHARING:
                self._share(False)
            else:
                for warning in caught:
                    warnings.warn(warning.message, stacklevel=2)

    def _share(self, share: bool) -> None:
        self.packing: Packing = {"share": share, "last_tokens": self._last_tokens or not share}
        self.added: AddedTokens = added_tokens(self.stores, **self.packing)
        typical = np.concatenate([self.added.forget, self.added.retain]).mean()
        if self.added.shared + typical > self._token_budget:
            # Two long prefixes do not fit in one micro-batch, so the plan counts every token of each sequence.
            self.added = added_tokens(self.stores, share=False, last_tokens=self.packing["last_tokens"])
        self.saved = 0.0
        self._planned: dict[int, EpochPlan] = {}  # the last plan

    @property
    def shares(self) -> bool:
        """Whether micro-batches store shared tokens once."""
        return self.packing["share"]

    def stop_sharing(self) -> None:
        """Store all tokens of every sequence in all plans from now on; the steps contain the same sequences."""
        self._share(False)

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of ``epoch``."""
        if epoch not in self._planned:
            self._planned = {epoch: self._plan(epoch)}
        return self._planned[epoch]

    def _plan(self, epoch: int) -> EpochPlan:
        return plan_epoch(
            self.added.forget,
            self.added.retain,
            alternates=self.added.alternate,
            shared_tokens=self.added.shared,
            pairs_per_step=self._pairs_per_step,
            token_budget=self._token_budget,
            world_size=self._world_size,
            seed=self._seed,
            epoch=epoch,
            retain_sampling=self._retain_sampling,
            drop_last=self._drop_last,
        )

    def tokens(self, plan: EpochPlan, *, batches: int | None = None) -> tuple[int, int]:
        """Return the tokens that the first micro-batches of ``plan`` store, and would store without sharing.

        Args:
            plan: a plan of this planner.
            batches: number of micro-batches to count; None counts all.
        """
        stored = full = 0
        for b in range(min(len(plan.batch_tokens), len(plan.batch_tokens) if batches is None else batches)):
            items = slice(plan.batch_offsets[b], plan.batch_offsets[b + 1])
            size = packed_size(self.stores, plan.roles[items], plan.sequences[items], **self.packing)
            stored += size.tokens
            full += size.path_tokens
        return stored, full
