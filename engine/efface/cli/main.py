"""``efface <command>``: picks the command and turns errors of use into messages and exit codes."""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import efface

# command -> module and what it does; the modules are imported only when their command is called
COMMANDS = {
    "audit": ("efface.cli.audit", "ask models in many ways for what they should have forgotten"),
    "bench": ("efface.cli.bench", "measure speed and memory against rivals; needs the repository"),
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
EXIT_CODES = {
    0: "done",
    1: "a fault in efface, or a sweep without a finished trial",
    EXIT_USAGE: "wrong use, or input that cannot be read",
    EXIT_DIVERGED: "the loss or the weights diverged; no model was written",
    EXIT_INTERRUPTED: "interrupted; the same command continues",
}
# Flags that every command takes, and what they do.
COMMON = {
    "--help": "show the flags of the command that are used most, and examples",
    "--help-all": "show all of its flags",
    "--debug": "show tracebacks of errors",
}


def _listed(lines: Mapping[Any, str]) -> str:
    width = max(len(str(name)) for name in lines)
    return "\n".join(f"  {name!s:<{width}}  {text}" for name, text in lines.items())


def _help() -> str:
    return (
        "usage: efface [--version] <command> [flags]\n\n"
        "Fast, exact unlearning for Hugging Face causal language models.\n\n"
        f"commands:\n{_listed({name: summary for name, (_, summary) in COMMANDS.items()})}\n\n"
        f"flags of every command:\n{_listed(COMMON)}\n\n"
        f"exit codes:\n{_listed(EXIT_CODES)}\n\n"
        "Results go to standard output, as JSON where a command has --json; progress and errors to standard error."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, one of ``EXIT_CODES``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "--version"):
        print(f"efface {efface.__version__}" if name == "--version" else _help())
        return 0 if arguments else EXIT_USAGE
    if name not in COMMANDS:
        print(f"efface: unknown command {name!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_USAGE
    return _run(name, rest)


# Other libraries draw no bars, and transformers says nothing below an error: what it warns of when it loads a model,
# efface refuses. Read when they are imported; a user's own values hold.
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def _run(name: str, rest: Sequence[str]) -> int:
    for variable, value in _QUIET.items() if "--debug" not in rest else ():
        os.environ.setdefault(variable, value)
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
