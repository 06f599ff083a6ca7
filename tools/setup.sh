#!/bin/sh
# Create .venv with the locked dependencies, and see that headless MuJoCo finds an OpenGL. Run through `make setup`.
# UV=1 installs them with uv, which takes a fraction of the time and chooses torch's build by this machine's GPU.
set -eu

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

# Print a Python 3.12 that uv fetched; uv is the machine's, else comes from PyPI for this once.
fetched() {
    uv=$(command -v uv || true)
    if [ -z "$uv" ]; then
        python3 -m venv "$tools" >/dev/null 2>&1 && "$tools/bin/pip" install --quiet uv >/dev/null 2>&1 || return 1
        uv=$tools/bin/uv
    fi
    "$uv" python install --quiet 3.12 && "$uv" python find --managed-python 3.12
}

python=
for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if fits "$candidate"; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
    tools=$(mktemp -d)
    trap 'rm -rf "$tools"' EXIT
    echo "setup: no Python 3.11, 3.12 or 3.13 found; fetching 3.12 with uv" >&2
    python=$(fetched) || python=
fi
if [ -z "$python" ] || ! fits "$python"; then
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
if [ -n "${UV:-}" ]; then
    .venv/bin/pip install --quiet --disable-pip-version-check "$(grep '^uv==' requirements.lock)"
    .venv/bin/uv pip install --quiet --python .venv/bin/python --torch-backend=auto -r requirements.lock
else
    .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
fi
.venv/bin/python -m prelar.envs.gl --install
.venv/bin/python -m prelar.simulator.runtime --install || true  # without it the page says so
touch .venv/.ready
