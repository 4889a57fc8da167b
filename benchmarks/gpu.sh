#!/bin/sh
# Every figure that only a GPU can give, into benchmarks/results/. From the repository's root:
#
#     PYTHON=.venv/bin/python sh benchmarks/gpu.sh
#
# Written for one GPU of 24 GiB or more, which is used as if it had 24 GiB; needs the gpu extra and, to compare with
# TRL, trl==1.15.0 and liger-kernel. Nothing is downloaded. What fails is named at the end, and nothing else stops.
set -u
python=${PYTHON:-python}
cap=${CAP:-24GiB}
results=${RESULTS:-benchmarks/results}
export HF_HUB_OFFLINE=1
failed=

measure() {
    name=$1
    shift
    echo "== $name: $*" >&2
    timeout 600 "$@" || failed="$failed $name"
}

update() {
    shape=$1
    name=$2
    shift 2
    measure "$shape-$name" "$python" benchmarks/update.py --shape "$shape" --memory-cap "$cap" \
        --json "$results/update-$shape-$name.json" "$@"
}

has() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

# The context of R1-Distill at 8 positives, five updates each.
update qwen2.5-1.5b 32k --rival none --lengths 32768 --updates 5
update qwen2.5-7b 16k --rival none --lengths 16384 --updates 5

# The longest that fits, with the fused and with the naive loss.
update qwen2.5-1.5b longest --find-longest --resolution 1024
update qwen2.5-7b longest --find-longest --resolution 1024

# Against TRL, and measured against planned peaks, at three lengths.
rival=none
has trl && rival=trl
update qwen2.5-1.5b "$rival" --rival "$rival" --lengths 2048 8192 16384 --updates 3
update qwen2.5-7b "$rival" --rival "$rival" --lengths 2048 4096 8192 --updates 3
has trl && has liger_kernel && update qwen2.5-1.5b trl-liger --rival trl-liger --lengths 8192 --updates 3

# unsloth's backend against transformers' (the lines "ours" above).
has unsloth && update qwen2.5-1.5b unsloth --backend unsloth --rival none --lengths 2048 8192 --updates 3

# A step as a run would take it, rollouts included.
measure bench "$python" -m popo_lite bench qwen_1_5b_lora --memory-cap "$cap" --prompts 4 --steps 1 --json \
    >"$results/bench-qwen_1_5b_lora.json"

# The loss alone, and the samplers.
measure head_loss "$python" benchmarks/head_loss.py --device cuda --json "$results/head_loss-cuda.json"
engines=hf
has vllm && engines="hf vllm"
# shellcheck disable=SC2086  # one argument for each engine
measure rollouts "$python" benchmarks/rollouts.py --engines $engines

measure tests "$python" -m pytest -q -m gpu

[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
