"""The sections of the calls: modules with functions that take a ``benchmarks.gpu.section.Run``.

``CALLS`` lists the sections of each call, the most important first, with their time limits.
"""

from dataclasses import dataclass

_HEADS = ("GPU: Llama-3.2-1B", "GPU: Llama-3.2-3B", "GPU: Llama-2-7B", "GPU: Phi-1.5, without")
_SMALL = ("GPU: Llama-3.2-1B, 64 rows", "GPU: Llama-3.2-1B, 1024 rows")
_OTHERS = ("GPU: KL retain", "GPU: SimNPO", "GPU: NLL", "GPU: GradDiff", "GPU: DPO")


@dataclass(frozen=True)
class Section:
    """A measurement that runs in a subprocess.

    Attributes:
        name: in the results; unique within a call.
        seconds: time limit.
        module: below ``benchmarks.gpu.sections``, or absolute if it contains a dot; by default the section's name.
            A function other than ``run`` is given as ``module:function``.
        arguments: given to the function as ``Run.arguments``.
        native: whether it imports ``efface`` and so needs the C++ extension.
    """

    name: str
    seconds: float
    module: str | None = None
    arguments: tuple[str, ...] = ()
    native: bool = False

    @property
    def imported(self) -> str:
        """The absolute name of the module, with the function if one is given."""
        module = self.module or self.name
        return module if "." in module else f"benchmarks.gpu.sections.{module}"


@dataclass(frozen=True)
class Call:
    """Sections that run in order, and their total time limit in seconds, which also bounds the last ones."""

    seconds: float
    sections: tuple[Section, ...]


def _loss(*shapes: str, without: tuple[str, ...], seconds: float) -> tuple[str, ...]:
    shaped = [part for shape in shapes for part in ("--shape", shape)]
    left_out = [part for text in without for part in ("--without", text)]
    return ("loss", *shaped, *left_out, "--rounds", "25", "--seconds", str(seconds))


# Excluded: eager's torch.compile, which would take most of a call, and efface's torch passes, which are only the GPU's
# fallback. Other implementations that compile stay: cut-cross-entropy's default an argsort, Liger's DPO its chunks. DPO
# comes last because of that.
_NEVER = ("torch.compile", "efface torch")
_RIVALS = ("liger", "cut-cross-entropy", "quack", "torch linear_cross_entropy")
CALLS = {
    # Correctness, and where the time goes.
    1: Call(
        190,
        (
            Section("machine", 40),  # includes the first import of torch from a fresh disk
            Section(
                "trial", 40, "loss:trial"
            ),  # compiles every kernel for three dtypes, and a launcher for each, sequentially
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
    # After fixes: all tests, and the comparison with other implementations.
    2: Call(
        200,
        (
            Section("machine", 40),
            Section("tests", 80, arguments=("--parallel",)),
            Section("rivals", 150, "suite", _loss(*_HEADS, *_SMALL, *_OTHERS, without=(*_NEVER, "quack"), seconds=3.0)),
        ),
    ),
    # Whole training steps.
    3: Call(
        215,
        (
            Section("train", 75, native=True),  # includes torch's import from a fresh disk and the kernel trial
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
