#!/usr/bin/env bash
# Prints the path of a Chromium, installed through apt where there is none and that is possible; fails with the reason otherwise.
set -euo pipefail
# Test files run beside each other: one installs, the others wait for it.
if command -v flock >/dev/null; then
    exec 9>"${TMPDIR:-/tmp}/glmv-chromium-$(id -u).lock"
    flock 9
fi
for name in chromium chromium-browser google-chrome; do
    if command -v "$name"; then exit 0; fi
done
if ! command -v apt-get >/dev/null; then echo "no Chromium, and no apt to install it" >&2; exit 1; fi
if [ "$(id -u)" -ne 0 ]; then echo "no Chromium, and installing it needs root: apt-get install chromium" >&2; exit 1; fi
log="$(mktemp)"
trap 'rm -f "$log"' EXIT
if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium fonts-dejavu-core; } >"$log" 2>&1; then
    echo "no Chromium, and apt cannot install it: $(grep -m 1 '^E:' "$log" || tail -n 1 "$log")" >&2
    exit 1
fi
command -v chromium
