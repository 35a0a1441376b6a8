#!/usr/bin/env bash
# Does the wheel work where there is nothing else? Installs it into an empty environment outside of the repository, for each
# Python and each JAX that it is declared for, and runs benchmarks/smoke.py there.
#
#   benchmarks/smoke.sh WHEEL [PYTHON ...]     python3.11 python3.12 python3.13, those of them that there are
#
# Needs the package index. Prints a line for each environment; exits with 1 if one of them failed or there was none.
set -euo pipefail
wheel=$(realpath "$1")
test=$(realpath "$(dirname "$0")/smoke.py")
shift
if (($# == 0)); then set -- python3.11 python3.12 python3.13; fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PYTHONPATH
install() { environment/bin/pip install --quiet --disable-pip-version-check "$@"; }
ran=0 failed=0
for python in "$@"; do
    if ! version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
        echo "smoke: no $python here, left out"
        continue
    fi
    for jax in 0.10 0.11 0.12; do
        if [ "$version" = 3.11 ] && [ "$jax" != 0.10 ]; then continue; fi # the others need Python 3.12
        name="Python $version, JAX $jax"
        rm -rf environment user
        : >more
        "$python" -m venv environment
        mkdir user
        ran=$((ran + 1))
        if install "$wheel" "jax==$jax.*" >log 2>&1 && (cd user && ../environment/bin/python "$test") >>log 2>&1 &&
            install "$wheel[export]" "jax==$jax.*" >more 2>&1 && (cd user && ../environment/bin/python "$test" export) >>more 2>&1; then
            echo "smoke: $name: $(tail -n 1 log)"
        else
            cat log more
            echo "smoke: $name: FAILED, see above"
            failed=1
        fi
    done
done
if ((ran == 0)); then
    echo "smoke: none of $* is here"
    exit 1
fi
exit $failed
