#!/usr/bin/env bash
# The runs that need an accelerator: the paper's settings in full. Stops cleanly after a time, and goes on when called
# again with the same folder.
#
#   benchmarks/accelerator.sh [SECONDS] [FOLDER] [MNIST] [SVHN]
#
# SECONDS to run at most (540), FOLDER for the workdirs (runs/accelerator), data sets as --data takes them (mnist, svhn;
# on a machine without network the files that `python -m e2sad_jax.data mnist --to=mnist.npz` writes); paths are relative
# to the repository. Exits with 0 when everything is done, 143 when time ran out, otherwise as the run that failed.
# PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
end=$((SECONDS + ${1:-540}))
folder=${2:-runs/accelerator}
mnist=${3:-mnist}
svhn=${4:-svhn}
python=${PYTHON:-python}

run() { # name, experiment, flags: one run, in the time that is left; what is finished already costs nothing
    local name=$1 experiment=$2 code=0
    shift 2
    if [ -e "$folder/$name/results.json" ]; then return; fi
    if ((end - SECONDS < 120)); then exit 143; fi
    # TERM saves a checkpoint; KILL, if that takes too long, loses what came after the last one.
    timeout --foreground --kill-after=60 --signal=TERM "$((end - SECONDS - 60))" \
        "$python" -m "experiments.$experiment" --workdir="$folder/$name" --checkpoint_every=2000 "$@" || code=$?
    if ((code == 124 || code == 137)); then exit 143; fi
    if ((code)); then exit "$code"; fi
}

"$python" -c 'import jax; print(jax.__version__, jax.devices())'
run mnist-e2sad mnist --data="$mnist" --defense=e2sad
run mnist-fgsm mnist --data="$mnist" --defense=fgsm
run svhn-e2sad svhn --data="$svhn" --defense=e2sad
run svhn-fgsm svhn --data="$svhn" --defense=fgsm
run mnist-e2sad-bf16 mnist --data="$mnist" --defense=e2sad --precision=bf16
