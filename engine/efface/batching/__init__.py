"""Batching of token sequences: token stores, epoch plans, and packed batches in which shared beginnings occur once."""

from efface.batching.assemble import Assembler, Step
from efface.batching.pack import PackedBatch, pack, pack_items, pack_store, packed_size
from efface.batching.plan import EpochPlan, MicroBatch, RetainSampling, Role, StepTotals, plan_epoch
from efface.batching.planner import EpochPlanner
from efface.batching.prefixes import AddedTokens, added_tokens
from efface.batching.store import TokenStore

__all__ = [
    "AddedTokens",
    "Assembler",
    "EpochPlan",
    "EpochPlanner",
    "MicroBatch",
    "PackedBatch",
    "RetainSampling",
    "Role",
    "Step",
    "StepTotals",
    "TokenStore",
    "added_tokens",
    "pack",
    "pack_items",
    "pack_store",
    "packed_size",
    "plan_epoch",
]
