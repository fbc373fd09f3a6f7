#!/usr/bin/env bash
# Installs SLURM's programs through apt where they are missing and that is possible; fails with the reason otherwise.
# No service is started: tests/slurm/cluster.py starts a cluster of its own, with its own keys, ports and folders.
set -euo pipefail
if command -v flock >/dev/null; then
    exec 9>"${TMPDIR:-/tmp}/glmv-slurm-$(id -u).lock"
    flock 9
fi
export PATH="$PATH:/usr/sbin:/sbin"
missing() {
    local name
    for name in slurmctld slurmd sbatch munged mungekey; do
        command -v "$name" >/dev/null || { echo "$name"; return; }
    done
}
if [ -z "$(missing)" ]; then exit 0; fi
if ! command -v apt-get >/dev/null; then echo "no SLURM ($(missing) is missing), and no apt to install it" >&2; exit 1; fi
if [ "$(id -u)" -ne 0 ]; then echo "no SLURM ($(missing) is missing), and installing it needs root: apt-get install slurm-wlm munge" >&2; exit 1; fi
log="$(mktemp)" policy=/usr/sbin/policy-rc.d
trap 'rm -f "$log"' EXIT
if [ ! -e "$policy" ]; then # tells apt's scripts to start no service
    trap 'rm -f "$log" "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge; } >"$log" 2>&1; then
    echo "no SLURM, and apt cannot install it: $(grep -m 1 '^E:' "$log" || tail -n 1 "$log")" >&2
    exit 1
fi
if [ -n "$(missing)" ]; then echo "no SLURM: apt installed it without $(missing)" >&2; exit 1; fi
