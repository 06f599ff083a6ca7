"""Prefect flows: wiring of the stages that gather data. No mathematics, no ffmpeg flags, no torch."""

from flows.runtime import set_environment

set_environment()
