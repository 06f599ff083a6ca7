"""The page that shows a run: reports/index.html, one file that needs nothing else."""

from prelar.report.page import render, run

__all__ = ["render", "run"]
