"""Stand-in for RLBench."""

__version__ = "1.2.0"
