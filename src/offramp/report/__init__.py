"""Plots, tables and the self-contained page of a reproduction, from its results alone."""

from offramp.report.drawing import save_png
from offramp.report.html import write_report
from offramp.report.plots import exit_ppl, frontier, seed_spread, threshold_curves
from offramp.report.reproduction_tables import markdown, rich_tables

__all__ = [
    "exit_ppl",
    "frontier",
    "markdown",
    "rich_tables",
    "save_png",
    "seed_spread",
    "threshold_curves",
    "write_report",
]
