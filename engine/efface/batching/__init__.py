"""Packed batches: token stores, the plan of an epoch, and the batches assembled from both."""

from efface.batching.pack import PackedBatch, pack
from efface.batching.plan import MicroBatch, plan_epoch
from efface.batching.roles import Role, StepTotals
from efface.batching.store import TokenStore

__all__ = ["MicroBatch", "PackedBatch", "Role", "StepTotals", "TokenStore", "pack", "plan_epoch"]
