"""Part of the stand-in for RLBench."""
