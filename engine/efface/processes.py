"""The processes of one run: what they know of each other, and how they part."""

import gc

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """Return what ``accelerate`` knows of the processes that work together."""
    # Unless told that there is no accelerator it does not look for other processes on CPUs.
    return PartialState(cpu=not torch.accelerator.is_available())


def leave() -> None:
    """Part from the other processes, when all of them are done; call it where no variable holds a trainer any more.

    A process that leaves without a word tears connections that others still read from. One that leaves the connection
    to the end of the interpreter may never end: a thread of gloo lets go of the last tensor late, for which it needs
    the interpreter's lock, and ``DistributedDataParallel``, freed under that lock, waits for the thread.
    """
    if torch.distributed.is_initialized():
        gc.collect()  # a wrapped model and its trainer hold each other; none must hold the connection
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
