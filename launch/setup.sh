#!/usr/bin/env bash
# Sets up a machine: system packages, .venv, the project. `make` calls it unless .venv/.ready is newer
# than pyproject.toml and this file.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

"$python" - <<'PY' || exit 2
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    found = ".".join(map(str, sys.version_info[:3]))
    sys.exit(f"setup: python3 is {found}, but dist_scan needs 3.11 to 3.13. "
             "Install one and call: make PYTHON=python3.12 ...")
PY

# Packages that the build of ffcv needs. The compiler and pkg-config files are tested, not the names
# of packages, so an OpenCV that was installed otherwise is used.
missing=()
command -v g++ >/dev/null || missing+=(g++)
command -v pkg-config >/dev/null || missing+=(pkg-config)
if ! pkg-config --exists opencv4 2>/dev/null; then missing+=(libopencv-dev); fi
if ! pkg-config --exists libturbojpeg 2>/dev/null; then missing+=(libturbojpeg0-dev); fi
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
"$python" - <<'PY' || missing+=(python3-dev)
import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())
PY
# Slurm for the tests on the test cluster (CI); tests/slurm/cluster.py starts it in a folder of its own.
if [ "${DIST_SCAN_TEST_SLURM:-}" = 1 ]; then
    for command in slurmctld slurmd srun; do
        command -v "$command" >/dev/null || { missing+=(slurm-wlm); break; }
    done
    command -v munged >/dev/null || missing+=(munge)
fi

if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ]; then
        sudo=""
    elif sudo -n true 2>/dev/null; then
        sudo="sudo -n"
    else
        sudo=none
    fi
    if [ "$sudo" = none ] || ! command -v apt-get >/dev/null; then
        echo "setup: missing system packages: ${missing[*]}." \
            "Ask an administrator for: apt-get install ${missing[*]}" >&2
        exit 2
    fi
    echo "setup: installing ${missing[*]} through apt"
    $sudo apt-get update -qq
    $sudo env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

if [ ! -x .venv/bin/python ]; then
    echo "setup: creating .venv and installing uv, which installs the rest"
    "$python" -m venv .venv
fi
.venv/bin/python -m pip install -q --disable-pip-version-check uv
echo "setup: installing dist_scan and its dependencies into .venv (8 GB of disk)"
VIRTUAL_ENV=$PWD/.venv .venv/bin/uv pip install -q -e '.[dev]'
touch .venv/.ready
echo "setup: done"
