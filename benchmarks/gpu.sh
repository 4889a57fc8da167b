#!/bin/sh
# Every figure that only a GPU can give, into benchmarks/results/. From the repository's root:
#
#     PYTHON=.venv/bin/python sh benchmarks/gpu.sh
#
# Written for one GPU of 24 GiB or more, which is used as if it had 24 GiB; needs the gpu extra and, to compare with
# TRL, trl==1.15.0 and liger-kernel. Nothing is downloaded. What fails is named at the end, and nothing else stops.
# CAP is the GPU's memory, LIMIT the seconds that one measurement may take (0: any); update.py leaves what it has
# measured by then.
set -u
python=${PYTHON:-python}
cap=${CAP:-24GiB}
limit=${LIMIT:-3600}
results=${RESULTS:-benchmarks/results}
export HF_HUB_OFFLINE=1
failed=

measure() {
    name=$1
    shift
    echo "== $name: $*" >&2
    timeout "$limit" "$@" || failed="$failed $name"
}

update() {
    shape=$1
    name=$2
    shift 2
    measure "$shape-$name" "$python" benchmarks/update.py --shape "$shape" --memory-cap "$cap" \
        --json "$results/update-$shape-$name.json" "$@"
}

bench() {
    name=$1
    shift
    measure "bench-$name" "$python" -m popo_lite bench "$@" --json >"$results/bench-$name.json"
    [ -s "$results/bench-$name.json" ] || rm "$results/bench-$name.json"
}

has() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

# The context of R1-Distill at 8 positives, five updates each.
update qwen2.5-1.5b 32k --rivals none --lengths 32768 --updates 5
update qwen2.5-7b 16k --rivals none --lengths 16384 --updates 5

# The longest that fits, with the fused and with the naive loss.
update qwen2.5-1.5b longest --find-longest --resolution 1024
update qwen2.5-7b longest --find-longest --resolution 1024

# Against TRL, with and without Liger's kernels where they are installed, and measured against planned peaks.
rivals=none
has trl && rivals=trl
[ $rivals = trl ] && has liger_kernel && rivals="trl trl-liger"
# shellcheck disable=SC2086  # one argument for each rival
update qwen2.5-1.5b rivals --rivals $rivals --lengths 2048 8192 16384 --updates 3
# shellcheck disable=SC2086
update qwen2.5-7b rivals --rivals $rivals --lengths 2048 4096 8192 --updates 3

# unsloth's backend against transformers' (the lines "ours" above).
has unsloth && update qwen2.5-1.5b unsloth --backend unsloth --rivals none --lengths 2048 8192 --updates 3 \
    --sequences-per-pass 1

# A step as a run would take it, rollouts included. The cap does not go with vLLM, which has the whole GPU.
bench qwen_1_5b_lora-hf qwen_1_5b_lora --memory-cap "$cap" --set rollout.engine=hf --prompts 4 --steps 1
has vllm && bench qwen_1_5b_lora-vllm qwen_1_5b_lora --prompts 4 --steps 1

# The loss alone, and the samplers.
measure head_loss "$python" benchmarks/head_loss.py --device cuda --json "$results/head_loss-cuda.json"
engines=hf
has vllm && engines="hf vllm"
# shellcheck disable=SC2086  # one argument for each engine
measure rollouts "$python" benchmarks/rollouts.py --engines $engines

measure tests "$python" -m pytest -q -m gpu

[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
