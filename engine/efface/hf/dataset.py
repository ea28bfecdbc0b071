"""The micro-batches of a run as a map-style data set, so that any data loader and sampler of torch can carry it."""

from typing import Any

import torch
from torch.utils.data import Dataset

from efface.batching import TokenStore, pack, plan_epoch
from efface.hf.reference import CachedReference


class PackedDataset(Dataset[dict[str, Any]]):
    """Item i is the i-th micro-batch of the current epoch: ``batch``, ``totals``, and ``reference_sums`` if cached."""

    def __init__(
        self,
        forget: TokenStore,
        retain: TokenStore,
        *,
        pairs_per_batch: int,
        batches_per_step: int,
        seed: int,
    ) -> None:
        self._forget, self._retain = forget, retain
        self._settings = {"pairs_per_batch": pairs_per_batch, "batches_per_step": batches_per_step, "seed": seed}
        self.reference: CachedReference | None = None  # set once the model can score
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Plan ``epoch``; every epoch has the same number of micro-batches."""
        self._plan = plan_epoch(self._forget, self._retain, epoch=epoch, **self._settings)

    def __len__(self) -> int:
        """Return the micro-batches of an epoch."""
        return len(self._plan)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Assemble a micro-batch."""
        planned = self._plan[index]
        batch = pack(self._forget, self._retain, planned.forget, planned.retain)
        item: dict[str, Any] = {"batch": batch, "totals": planned.totals}
        if self.reference is not None:
            item["reference_sums"] = self.reference.sums(batch, torch.from_numpy(planned.forget))
        return item
