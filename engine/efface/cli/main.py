"""``efface <command>``: picks the command and turns errors of use into messages and exit codes."""

import importlib
import sys
from collections.abc import Sequence

import efface

# command -> module and what it does; the modules are imported only when their command is called
COMMANDS = {
    "audit": ("efface.cli.audit", "ask models in many ways for what they should have forgotten"),
    "bench": ("efface.cli.bench", "measure speed and memory against rivals; needs the repository"),
    "cache": ("efface.cli.cache", "list or remove what runs keep: tokens of data sets, references"),
    "cache-reference": ("efface.cli.cache_reference", "compute the reference of a forget set once for all runs"),
    "completion": ("efface.cli.completion", "print what completes commands in bash, zsh or tcsh"),
    "demo": ("efface.cli.demo", "teach a small model, make it forget, and measure it"),
    "evaluate": ("efface.cli.evaluate", "measure what a model forgot and what it can still do: TOFU's evaluation"),
    "finetune": ("efface.cli.finetune", "teach a model a data set: full and retain models"),
    "plan": ("efface.cli.plan", "show what an epoch holds: steps, forward passes, tokens"),
    "recipes": ("efface.cli.recipes", "list the recipes, or explain one"),
    "report": ("efface.cli.report", "show evaluated runs side by side, on one page"),
    "sweep": ("efface.cli.sweep", "run a recipe with many settings, and rank the results"),
    "unlearn": ("efface.cli.unlearn", "make a checkpoint forget a data set"),
}

EXIT_USAGE = 2
EXIT_DIVERGED = 3
EXIT_INTERRUPTED = 130


def _help() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: efface [--version] <command> [options]\n\n"
        "Fast, exact unlearning for Hugging Face causal language models.\n\n"
        f"commands:\n{listed}\n\n"
        "`efface <command> --help` lists the options of a command."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0 done, 1 a sweep without a whole trial, 2 wrong use or input, 3 diverged, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "--version"):
        print(f"efface {efface.__version__}" if name == "--version" else _help())
        return 0 if arguments else EXIT_USAGE
    if name not in COMMANDS:
        print(f"efface: unknown command {name!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_USAGE
    return _run(name, rest)


def _run(name: str, rest: Sequence[str]) -> int:
    try:
        code = int(importlib.import_module(COMMANDS[name][0]).run(rest))
    except KeyboardInterrupt:
        print(f"efface {name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except FloatingPointError as error:
        print(f"efface {name}: error: {error}", file=sys.stderr)
        return EXIT_DIVERGED
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"efface {name}: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    if "torch" in sys.modules:  # a command without it has no other processes, and is instant
        importlib.import_module("efface.processes").leave()
    return code
