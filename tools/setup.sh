#!/bin/sh
# Create .venv with the locked dependencies, and see that headless MuJoCo finds an OpenGL. Run through `make setup`.
set -eu

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

python=
for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if fits "$candidate"; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
    echo "error: no Python 3.11, 3.12 or 3.13 found; install one, or name it: make setup PYTHON=/path/to/python3.12" >&2
    exit 2
fi

if [ ! -x .venv/bin/pip ]; then
    rm -rf .venv
    if ! "$python" -m venv .venv >/dev/null 2>&1; then
        rm -rf .venv
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
            apt-get update -qq && apt-get install -y -qq --no-install-recommends "python$version-venv"
            "$python" -m venv .venv
        else
            echo "error: $python cannot create environments; run: sudo apt-get install python3-venv" >&2
            exit 2
        fi
    fi
fi
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
.venv/bin/python -m prelar.envs.gl --install
.venv/bin/python -m prelar.simulator.runtime --install || true  # without it the page says so
touch .venv/.ready
