#!/usr/bin/env bash
# What is to be run on an accelerator: the cost of a step, a timed e2SAD run, and the paper's tables and studies at full
# scale. Stops cleanly after a time, and goes on when called again with the same folder.
#
#   benchmarks/accelerator.sh [MINUTES] [FOLDER] [MNIST] [SVHN]
#
# MINUTES to run at most (9), FOLDER for the runs (runs/accelerator), data sets as --data takes them (on a machine without
# network the files that `python -m e2sad_jax.data mnist --to=mnist.npz` writes; without SVHN its table is left out);
# paths are relative to the repository. Results go into results/full. Exits with 0 when everything is done, 4 when time
# ran out, otherwise as the command that failed. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
end=$((SECONDS + 60 * ${1:-9}))
folder=${2:-runs/accelerator}
mnist=${3:-}
svhn=${4:-}
python=${PYTHON:-python}

diverged=0

timed() { # a command, stopped cleanly when time is up
    local left=$((end - SECONDS)) code=0
    if ((left < 60)); then exit 4; fi
    timeout --signal=TERM "$left" "$@" || code=$?
    if ((code == 124 || code == 143)); then exit 4; elif ((code == 3)); then diverged=3; elif ((code)); then exit "$code"; fi
}

run() { # flags: one command in the time that is left; what is finished already costs little
    local left=$((end - SECONDS)) code=0
    if ((left < 60)); then exit 4; fi
    "$python" -m experiments.paper --scale=full --workdir="$folder" \
        --time_budget_minutes="$((left / 60)).$((left % 60 * 10 / 60))" "$@" || code=$?
    if ((code == 3)); then diverged=3; elif ((code)); then exit "$code"; fi
}

train() { # flags: one run from start to report, stopped cleanly when time is up
    timed "$python" -m experiments.mnist --data="$mnist" "$@"
}

compare() { # flags: experiments.compare in the time that is left
    timed "$python" -m experiments.compare --data="${mnist:-mnist}" --model=mnist_cnn --batch_size=256 \
        --seeds=3 --examples=10000 --queries=5000 --apgd_steps=100 --workdir="$folder/compare" "$@"
}

"$python" -c 'import jax; print(jax.__version__, jax.devices())'
# What a step costs, in each precision, beside PyTorch where it is installed; once.
if [ ! -e "$folder/step_cost/step_cost.json" ]; then
    peer=$("$python" -c 'import importlib.util as u; print("torch" if u.find_spec("torch") else "")')
    XLA_PYTHON_CLIENT_PREALLOCATE=false "$python" -m experiments.step_cost --precision=float32,tf32,bf16 --peer="$peer" \
        --results="$folder/step_cost" || true # a step that failed says so in its row
fi
# Is e2SAD done in a minute? And what does bfloat16 gain and cost? (training.json, results.md)
for precision in float32 bf16; do
    train --defense=e2sad --precision="$precision" --workdir="$folder/e2sad-$precision"
done
# Every defense at the same number of updates: what is left under the worst case, for which price; the same for the same
# FLOPs; e2SAD's robust preset as long as the paper trains; what each of its parts does.
compare --steps=6000 --results=results/compare_full
compare --steps=6000 --equal_flops --results=results/compare_equal
compare --steps=30000 --entry="e2SAD, robust" --entry=PGD-3 --results=results/compare_long
compare --steps=6000 --parts --results=results/compare_parts
run --data="$mnist" --table=1,2
run --data="$mnist" --study=second_step
run --data="$mnist" --figure=all
if [ -n "$svhn" ]; then run --data="$svhn" --table=3; fi
run --data="$mnist" --study=lam,labels,alpha
# The whole of Table 1 in bfloat16, beside the above: its accuracy and its time.
run --data="$mnist" --table=1 --precision=bf16 --results="$folder/bf16"
exit "$diverged"
