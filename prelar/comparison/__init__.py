"""The page that compares experiments: reports/compare.html, from the results that DVC keeps of each."""

from prelar.comparison.page import PAGE, render, run

__all__ = ["PAGE", "render", "run"]
