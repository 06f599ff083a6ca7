"""Measurements; see `__main__`. Threads that wait sleep, as in the stages, set before torch is imported."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
