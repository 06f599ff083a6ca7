#!/bin/sh
# See that there is a Chromium for the test of the UI. Run through `make test`.
set -eu

found() { command -v chromium || command -v chromium-browser || command -v google-chrome; }

if found >/dev/null; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null
fi
found >/dev/null || { echo "error: no Chromium, which a test drives; run: sudo apt-get install chromium" >&2; exit 2; }
