"""Batching of token sequences: token stores, epoch plans, packed batches without padding, and token trees."""

from efface.batching.assemble import Assembler, Step
from efface.batching.pack import PackedBatch, pack, pack_items
from efface.batching.plan import EpochPlan, MicroBatch, RetainSampling, Role, StepTotals, plan_epoch
from efface.batching.store import TokenStore
from efface.batching.tree import TokenTree, token_tree, tree_tokens

__all__ = [
    "Assembler",
    "EpochPlan",
    "MicroBatch",
    "PackedBatch",
    "RetainSampling",
    "Role",
    "Step",
    "StepTotals",
    "TokenStore",
    "TokenTree",
    "pack",
    "pack_items",
    "plan_epoch",
    "token_tree",
    "tree_tokens",
]
