"""The sections that calls are made of: modules whose functions are given a ``benchmarks.gpu.section.Run``.

``CALLS``: what is measured in each, in the order of what would be missed most, and for how long at most.
"""

from dataclasses import dataclass

_HEADS = ("GPU: Llama-3.2-1B", "GPU: Llama-3.2-3B", "GPU: Llama-2-7B", "GPU: Phi-1.5, without")
_SMALL = ("GPU: Llama-3.2-1B, 64 rows", "GPU: Llama-3.2-1B, 1024 rows")
_OTHERS = ("GPU: KL retain", "GPU: SimNPO", "GPU: NLL", "GPU: GradDiff", "GPU: DPO")


@dataclass(frozen=True)
class Section:
    """A process of its own.

    Attributes:
        name: in the results; of each call one.
        seconds: after which it is ended.
        module: below ``benchmarks.gpu.sections``, or anywhere with its whole name; None is the name. A function of it
            that is not ``run`` follows a colon.
        arguments: of its ``run``.
        native: whether it imports ``efface``, and so needs the C++ extension.
    """

    name: str
    seconds: float
    module: str | None = None
    arguments: tuple[str, ...] = ()
    native: bool = False

    @property
    def imported(self) -> str:
        """The module's whole name, and its function where one is named."""
        module = self.module or self.name
        return module if "." in module else f"benchmarks.gpu.sections.{module}"


@dataclass(frozen=True)
class Call:
    """Sections one after another, and the seconds of all: a section's own limit is never more than what is left."""

    seconds: float
    sections: tuple[Section, ...]


def _loss(*shapes: str, without: tuple[str, ...], seconds: float) -> tuple[str, ...]:
    shaped = [part for shape in shapes for part in ("--shape", shape)]
    left_out = [part for text in without for part in ("--without", text)]
    return ("loss", *shaped, *left_out, "--rounds", "25", "--seconds", str(seconds))


# Eager's torch.compile would take most of a call; efface's torch passes are what a GPU falls back to. What rivals
# compile themselves stays: cut-cross-entropy's default an argsort, Liger's DPO its chunks, which therefore come last.
_NEVER = ("torch.compile", "efface torch")
_RIVALS = ("liger", "cut-cross-entropy", "quack", "torch linear_cross_entropy")
CALLS = {
    # Is it right, and where is the time?
    1: Call(
        190,
        (
            Section("machine", 40),  # the first import of torch on a fresh disk is in it
            Section(
                "trial", 40, "loss:trial"
            ),  # compiles every kernel for three dtypes, and a launcher for each, one by one
            Section("floor", 55, "suite", _loss(*_HEADS, without=(*_NEVER, *_RIVALS), seconds=2.5)),
            Section("profile", 20, "loss:profile"),
            Section("attention", 20, native=True),
            Section("products", 25, "loss:products"),
            Section("sweep", 35),
            Section(
                "tests", 70, arguments=("on_gpu", "row_pass", "distribution_pass", "linear_loss_rule", "--parallel")
            ),
        ),
    ),
    # After fixes: is all of it right, and who is faster?
    2: Call(
        200,
        (
            Section("machine", 40),
            Section("tests", 80, arguments=("--parallel",)),
            Section("rivals", 150, "suite", _loss(*_HEADS, *_SMALL, *_OTHERS, without=(*_NEVER, "quack"), seconds=3.0)),
        ),
    ),
    # Whole steps.
    3: Call(
        215,
        (
            Section("train", 75, native=True),  # torch from a fresh disk, and the trial of every kernel, are in it
            Section(
                "steps",
                150,
                "suite",
                ("step", "--without", "LoRA", "--without", "cut-cross-entropy", "--rounds", "16"),
                native=True,
            ),
            Section("machine", 30),
        ),
    ),
}
