"""The state of a run's distributed processes, and the clean shutdown of their process group."""

import gc

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """Return the ``accelerate.PartialState`` of the run: rank, number of processes and device."""
    # PartialState looks for other processes on CPUs only with cpu=True.
    return PartialState(cpu=not torch.accelerator.is_available())


def leave() -> None:
    """Wait for all processes and destroy the process group; a no-op if there is no process group.

    Call it when no variable refers to a trainer any more. A process that exits without this call closes connections
    that other processes still read from. A process that leaves the process group to interpreter shutdown can hang:
    a gloo thread needs the GIL to release its last tensor, while ``DistributedDataParallel``, which is freed with the
    GIL held, waits for that thread.
    """
    if torch.distributed.is_initialized():
        gc.collect()  # frees the reference cycle of a wrapped model and its trainer, which keeps the group alive
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
