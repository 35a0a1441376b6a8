#!/usr/bin/env bash
# What is to be run on an accelerator: timed e2SAD runs, the cost of a step, and every defense and the paper's tables and
# studies at full scale. Stops cleanly after a time, and goes on when called again with the same folder.
#
#   benchmarks/accelerator.sh [MINUTES] [FOLDER] [MNIST] [SVHN]
#
# MINUTES to run at most (9; at least 2), FOLDER for the runs (runs/accelerator), data sets as --data takes them (on a
# machine without network the files that `python -m e2sad_jax.data mnist --to=mnist.npz` writes; without SVHN its table is
# left out); paths are relative to the repository.
#
# Results: FOLDER/e2sad-*, FOLDER/step_cost/*, FOLDER/bf16, and in results/: compare_{full,equal,long,parts} and full. What
# is finished has a file in FOLDER/done; without it, or without its result, it is done again.
#
# Exits with 0 when everything is done; 3 likewise, but runs diverged, or 1, but a step could not be measured (its row says
# why); 4 when time ran out; otherwise as the command that failed.
#
# From the environment: PYTHON, the interpreter (python, else python3), and for a rehearsal in small E2SAD_RESULTS instead of
# results/, and flags that come last: E2SAD_TRAIN_FLAGS (of experiments.mnist, as "--steps=10 --batch_size=8"),
# E2SAD_STEP_COST_FLAGS, E2SAD_COMPARE_FLAGS, E2SAD_PAPER_FLAGS.
set -euo pipefail
cd "$(dirname "$0")/.."
end=$((SECONDS + 60 * ${1:-9}))
folder=${2:-runs/accelerator}
mnist=${3:-mnist}
svhn=${4:-}
python=${PYTHON:-$(command -v python || command -v python3)}
results=${E2SAD_RESULTS:-results}
read -ra train_flags <<<"${E2SAD_TRAIN_FLAGS:-}"
read -ra step_cost_flags <<<"${E2SAD_STEP_COST_FLAGS:-}"
read -ra compare_flags <<<"${E2SAD_COMPARE_FLAGS:-}"
read -ra paper_flags <<<"${E2SAD_PAPER_FLAGS:-}"

worst=0 # exit code of what is done although not all of it could be

look() { # sets left, the seconds that there are
    left=$((end - SECONDS))
}

finished() { # NAME RESULT: whether an earlier call has done it
    [ -e "$folder/done/$1" ] && [ -e "$2" ]
}

once() { # NAME RESULT COMMAND: what is not done yet, stopped cleanly when time is up
    local name=$1 result=$2 code=0
    shift 2
    if ! finished "$name" "$result"; then
        look
        if ((left < 60)); then exit 4; fi # nothing is begun
        mkdir -p "$folder/done"
        touch "$folder/done/.begun"
        # Whoever does not end within 40 seconds of the signal is killed: one program may compile for longer.
        timeout --signal=TERM --kill-after=40 "$left" "$@" || code=$?
        if ((code == 124 || (code == 137 && SECONDS >= end))); then exit 4; fi
        # 3: runs diverged, the others are done. 1 may be anything, but not after a whole table.
        if ((code && code != 3)) && ! { ((code == 1)) && whole "$result"; }; then exit "$code"; fi
        echo "$code" >"$folder/done/$name"
    fi
    code=$(<"$folder/done/$name")
    if ((code > worst)); then worst=$code; fi
}

whole() { # whether this call has written a table of step_cost with all its rounds
    [ "$1" -nt "$folder/done/.begun" ] && grep -q '"complete": true' "$1"
}

train() { # NAME FLAGS: one run from start to report
    once "$1" "$folder/$1/results.md" "$python" -m experiments.mnist --data="$mnist" --workdir="$folder/$1" "${@:2}" \
        ${train_flags[@]+"${train_flags[@]}"}
}

step_cost() { # NAME FLAGS: a table of what steps cost
    # On a GPU JAX would take most of the memory, and PyTorch needs some.
    once "step_cost-$1" "$folder/step_cost/$1/step_cost.json" env XLA_PYTHON_CLIENT_PREALLOCATE=false \
        "$python" -m experiments.step_cost --rounds=5 --results="$folder/step_cost/$1" "${@:2}" \
        ${step_cost_flags[@]+"${step_cost_flags[@]}"}
}

compare() { # NAME FLAGS: experiments.compare
    once "compare_$1" "$results/compare_$1/compare.json" "$python" -m experiments.compare --data="$mnist" \
        --model=mnist_cnn --batch_size=256 --seeds=3 --examples=10000 --queries=5000 --apgd_steps=100 \
        --workdir="$folder/compare" --results="$results/compare_$1" "${@:2}" ${compare_flags[@]+"${compare_flags[@]}"}
}

paper() { # NAME DATA FLAGS: experiments.paper, which knows when to stop
    look
    once "paper-$1" "$results/full" "$python" -m experiments.paper --scale=full --data="$2" --workdir="$folder" \
        --results="$results" --time_budget_minutes="$((left / 60)).$((left % 60 * 10 / 60))" "${@:3}" \
        ${paper_flags[@]+"${paper_flags[@]}"}
}

"$python" -c 'import jax; print(jax.__version__, jax.devices())'
# Is e2SAD done in a minute? And what do TensorFloat-32 and bfloat16 gain and cost? (training.json, results.md)
for precision in float32 tf32 bf16; do
    train "e2sad-$precision" --defense=e2sad --precision="$precision"
done
# What a step costs, in parts that each fit into a call: beside PyTorch, eager and compiled, where it can be used; by the
# steps of the attack; in each precision.
peer=
if ! finished step_cost-torch "$folder/step_cost/torch/step_cost.json"; then
    peer=$("$python" -c '
import jax, torch
print("torch" if jax.default_backend() == "cpu" or torch.cuda.is_available() else "")' 2>/dev/null) || peer=
fi
step_cost torch --defense=natural,fgsm,e2sad --peer="$peer" --compile_seconds=60
step_cost ifgsm --defense=natural,ifgsm --attack_steps=1,2,5,10,20,30,40
step_cost precisions --defense=natural,fgsm,hamm,e2sad --precision=float32,tf32,bf16
# Every defense at the same number of updates: what is left under the worst case, for which price; the same for the same
# FLOPs; e2SAD's robust preset as long as the paper trains; what each of its parts does.
compare full --steps=6000
compare equal --steps=6000 --equal_flops
compare long --steps=30000 --entry="e2SAD, robust" --entry=PGD-3
compare parts --steps=6000 --parts
paper tables "$mnist" --table=1,2
paper second_step "$mnist" --study=second_step
paper figures "$mnist" --figure=all
if [ -n "$svhn" ]; then paper svhn "$svhn" --table=3; fi
paper studies "$mnist" --study=lam,labels,alpha
# The whole of Table 1 in bfloat16, beside the above: its accuracy and its time.
results="$folder/bf16" paper bf16 "$mnist" --table=1 --precision=bf16
exit "$worst"
