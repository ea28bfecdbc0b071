"""TOFU's evaluation of a Llama with random weights: log-likelihoods of all answers, greedy answers."""

import argparse

from benchmarks.evaluate import generation, likelihood
from benchmarks.evaluate.shapes import SHAPES
from benchmarks.report import Report

__all__ = ["ROUNDS", "SHAPES", "add_arguments", "run"]

ROUNDS = 5
QUICK_ROUNDS = 2

# A part has run(shapes, rounds, report).
PARTS = {"likelihood": likelihood, "generation": generation}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Choose parts; be quick."""
    parser.add_argument("--part", action="append", choices=list(PARTS), help="default: all")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds")


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure the chosen parts on the chosen shapes."""
    shapes = {name: SHAPES[name] for name in options.shape}
    rounds = QUICK_ROUNDS if options.quick else options.rounds
    for part in options.part or PARTS:
        PARTS[part].run(shapes, rounds, report)
