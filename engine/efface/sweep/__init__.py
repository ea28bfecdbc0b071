"""Sweeps: many runs of one recipe, stored as an Optuna study that can be resumed and shared between machines."""

from efface.sweep.ledger import SAMPLERS, Ledger
from efface.sweep.ranking import Floor, Trial, best_of, ranked
from efface.sweep.results import Place
from efface.sweep.run import KEEP, Launcher, Loop, Process
from efface.sweep.space import Space, known_presets, load_preset, parse_grid, parse_space, point_name, points

__all__ = [
    "KEEP",
    "SAMPLERS",
    "Floor",
    "Launcher",
    "Ledger",
    "Loop",
    "Place",
    "Process",
    "Space",
    "Trial",
    "best_of",
    "known_presets",
    "load_preset",
    "parse_grid",
    "parse_space",
    "point_name",
    "points",
    "ranked",
]
