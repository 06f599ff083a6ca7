#!/bin/sh
# Add RLBench and PyRep, from their public repositories, to .venv for live demonstrations. Run through
# `make rlbench-setup`. CoppeliaSim 4.1.0 is the user's to install; COPPELIASIM_ROOT names its folder.
set -eu

PYREP=8f420be8064b1970aae18a9cfbc978dfb15747ef
RLBENCH=02720bba4c73fe02eb75df946b8791b806028a9d

refuse() { echo "error: $1" >&2; exit 2; }

[ -n "${COPPELIASIM_ROOT:-}" ] || refuse "COPPELIASIM_ROOT is not set; install CoppeliaSim 4.1.0 and set it to that folder"
[ -e "$COPPELIASIM_ROOT/libcoppeliaSim.so" ] || refuse "COPPELIASIM_ROOT = $COPPELIASIM_ROOT: holds no libcoppeliaSim.so; set it to CoppeliaSim 4.1.0's folder"
[ -w "$COPPELIASIM_ROOT" ] || refuse "COPPELIASIM_ROOT = $COPPELIASIM_ROOT: cannot be written to, and PyRep adds a script to it; copy the folder"
command -v git >/dev/null || refuse "git is missing; install it"
command -v cc >/dev/null || refuse "a C compiler is missing; run: apt-get install build-essential"

pip="${PYTHON:-.venv/bin/python} -m pip --quiet --disable-pip-version-check"
LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$COPPELIASIM_ROOT"
export LD_LIBRARY_PATH
$pip install --constraint requirements.lock cffi natsort==8.4.0 pyquaternion==0.9.9 scipy setuptools wheel
$pip install --no-build-isolation --no-deps "pyrep @ git+https://github.com/stepjam/PyRep.git@$PYREP"
$pip install --no-build-isolation --no-deps "rlbench @ git+https://github.com/stepjam/RLBench.git@$RLBENCH"
"${PYTHON:-.venv/bin/python}" -m prelar.demos.rlbench_live
