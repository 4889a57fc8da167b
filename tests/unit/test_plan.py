"""Test the memory plan: its sums, what fits and what does not, and that the advice fits."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch

from popo_lite.chunks import chunk_tokens
from popo_lite.errors import ModelError, UserInputError
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import load_recipe
from popo_lite.tools.plan import advice
from popo_lite.tools.plan.advice import advice_for, memory_advice, reductions, refuse_without_room
from popo_lite.tools.plan.command import installed_gpu
from popo_lite.tools.plan.shapes import ModelShape, adapted_linears, load_shape, shape_of
from popo_lite.tools.plan.vram import (
    CUDA_CONTEXT_BYTES,
    HOST,
    NCCL_BYTES,
    SHORTFALL,
    Machine,
    MemoryPlan,
    plan_memory,
)

GIB = 2**30
RECIPES = Path(__file__).parents[2] / "recipes"


def recipe_of(size: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / f"qwen_{size}_lora.toml", overrides)


def plan_of(recipe: Recipe, gib: float = 24) -> MemoryPlan:
    return plan_memory(recipe, load_shape(recipe.model), vram_bytes=round(gib * GIB))


def in_phase(recipe: Recipe, phase: str, gib: float = 24) -> dict[str, int]:
    return next(found for found in plan_of(recipe, gib).phases if found.name == phase).bytes


# ---------------------------------------------------------------------- phases


def test_both_gpu_recipes_fit_the_card_that_they_are_made_for() -> None:
    for size in ("1_5b", "7b"):
        plan = plan_of(recipe_of(size))
        assert plan.fits
        assert plan.engine == "vllm"
        assert plan.sequences_at_once is not None
        assert plan.sequences_at_once >= 32
        assert plan.longest_sequence_tokens >= plan.context_tokens


def test_phases_add_up_and_hold_the_base_throughout() -> None:
    plan = plan_of(recipe_of("1_5b"))
    assert [phase.name for phase in plan.phases] == ["load", "rollout", "siamese", "update", "step", "swap"]
    for phase in plan.phases:
        assert phase.total_bytes == sum(phase.bytes.values())
        assert all(size > 0 for size in phase.bytes.values())
        assert phase.bytes["base linears"] == plan.phases[0].bytes["base linears"]
        margin = phase.bytes.get("fragmentation", 0)
        assert phase.tensor_bytes == phase.total_bytes - CUDA_CONTEXT_BYTES - margin
    assert plan.peak.total_bytes == max(phase.total_bytes for phase in plan.phases)


def test_the_update_holds_each_layers_input_and_one_set_of_gradients() -> None:
    update = in_phase(recipe_of("1_5b"), "update")
    assert update["layer inputs"] == 28 * 8192 * 1536 * 2
    assert update["gradients"] == update["adapters"] + update["predictor head"]
    assert update["siamese average"] == update["adapters"] + update["predictor head"]
    offloaded = in_phase(recipe_of("1_5b", "train.offload_activations=true"), "update")
    assert offloaded["layer inputs"] == 2 * 8192 * 1536 * 2  # one is used, the next arrives


def test_a_micro_batch_is_at_least_one_longest_sequence() -> None:
    one = recipe_of("1_5b", "rollout.max_completion_length=3584", "train.tokens_per_microbatch=4096")
    assert in_phase(one, "update")["layer inputs"] == 28 * 4096 * 1536 * 2


def test_without_packing_layers_run_over_one_sequence_and_checkpoints_stay_those_of_all() -> None:
    half = "rollout.max_completion_length=3584"  # of the 8,192 tokens of a micro-batch, with the prompt
    packed, alone = (
        in_phase(recipe_of("1_5b", half, "train.logits_mib=64", f"train.packing={on}"), "update")
        for on in ("true", "false")
    )
    assert alone["layer inputs"] == packed["layer inputs"]
    # Not half: tiles of the MLP are as large.
    assert 0.5 < alone["layer working set"] / packed["layer working set"] < 0.8


def test_a_micro_batch_holds_no_more_than_a_step_has() -> None:
    few = recipe_of("1_5b", "data.prompts_per_step=1", "rollout.num_generations=2")
    both = 512 + 1024  # tokens of a prompt and an answer
    assert in_phase(few, "update")["layer inputs"] == 28 * 2 * 1536 * (both + 1024)  # the prompt once
    apart = few.with_values({"train.shared_prefix": False})
    assert in_phase(apart, "update")["layer inputs"] == 28 * 2 * 1536 * 2 * both


def test_without_checkpointing_every_layer_keeps_its_activations() -> None:
    kept = in_phase(recipe_of("1_5b"), "update")
    whole = in_phase(recipe_of("1_5b", "train.gradient_checkpointing=false"), "update")
    assert "layer inputs" not in whole
    assert whole["layer activations"] > 10 * (kept["layer inputs"] + kept["layer working set"]) / 2


def test_optimizer_state_is_on_the_host_between_steps_if_the_engine_sleeps() -> None:
    shared, kept = recipe_of("1_5b"), recipe_of("1_5b", "rollout.vllm.enable_sleep_mode=false")
    for phase in ("rollout", "siamese", "update", "swap"):
        assert "optimizer state" not in in_phase(shared, phase)
        assert "optimizer state" in in_phase(kept, phase)
    assert in_phase(shared, "step")["optimizer state"] == in_phase(kept, "step")["optimizer state"]


def test_a_sleeping_engine_gives_its_weights_and_cache_back() -> None:
    asleep, awake = (
        in_phase(recipe_of("1_5b", f"rollout.vllm.enable_sleep_mode={sleep}"), "update") for sleep in ("true", "false")
    )
    assert "engine weights" not in asleep
    assert "KV cache" not in asleep
    assert asleep["CUDA graphs"] == awake["CUDA graphs"]
    assert "CUDA graphs" not in in_phase(recipe_of("1_5b", "rollout.vllm.enforce_eager=true"), "update")


def test_the_engine_takes_its_share_of_the_gpu() -> None:
    for share in (0.35, 0.5):
        rollout = in_phase(recipe_of("1_5b", f"rollout.vllm.gpu_memory_utilization={share}"), "rollout")
        taken = sum(rollout[name] for name in ("engine weights", "engine, other", "KV cache", "CUDA graphs"))
        assert taken == round(share * 24 * GIB)


def test_eight_gib_with_a_share_of_045_hold_no_graphs_and_do_not_start() -> None:
    """vLLM takes its CUDA graphs from its share (since 0.21), which leaves no sequence of this recipe."""
    share = "rollout.vllm.gpu_memory_utilization=0.45"
    assert plan_of(recipe_of("1_5b", share), 8).engine_shortfall_bytes > 0
    assert plan_of(recipe_of("1_5b", share, "rollout.vllm.enforce_eager=true"), 8).engine_shortfall_bytes == 0


def test_the_check_of_the_engine_is_planned_while_it_is_awake() -> None:
    plan = plan_of(recipe_of("7b"))
    rollout = plan.phases[1]
    assert rollout.moment == "an answer is checked, in a layer"
    assert rollout.total_bytes - plan.phases[0].total_bytes < 0.6 * GIB  # 0.95 GiB with copies of the adapters


def test_a_head_without_a_kernel_takes_the_square_of_a_sequence() -> None:
    recipe, shape = recipe_of("1_5b"), load_shape(recipe_of("1_5b").model)
    odd = shape.model_copy(update={"head_width": 132})

    def update(shape: ModelShape) -> int:
        plan = plan_memory(recipe, shape, vram_bytes=24 * GIB)
        return next(phase for phase in plan.phases if phase.name == "update").tensor_bytes

    # float32 scores, their softmax and its gradient of 12 heads, for 8,192 tokens that see at most 1,536.
    assert update(odd) - update(shape) == pytest.approx(12 * 12 * 8192 * 1536, rel=0.2)


def test_bfloat16_is_not_planned_for_a_card_that_emulates_it() -> None:
    recipe = recipe_of("1_5b")
    machine: dict[str, Any] = {"vram_bytes": 24 * GIB, "capability": (7, 5)}
    with pytest.raises(UserInputError, match="does not compute in bfloat16") as caught:
        plan_memory(recipe, load_shape(recipe.model), **machine)
    assert caught.value.next_step == "--set model.dtype=float16"
    assert plan_memory(recipe_of("1_5b", "model.dtype=float16"), load_shape(recipe.model), **machine).fits


def test_the_engines_weights_follow_its_base() -> None:
    rollout = in_phase(recipe_of("7b"), "rollout")
    own = sum(rollout[name] for name in ("base linears", "embeddings", "LM head", "norms, biases"))
    assert rollout["engine weights"] == own
    whole = in_phase(
        recipe_of("7b", "rollout.vllm.base=dequantized", "rollout.vllm.gpu_memory_utilization=0.65"), "rollout"
    )
    assert whole["engine weights"] == 2 * 7_615_616_512


def test_what_others_hold_is_in_every_phase_and_the_engines_share_stays_one_of_the_whole_card() -> None:
    recipe = recipe_of("1_5b")
    shape = load_shape(recipe.model)
    alone, beside = (plan_memory(recipe, shape, vram_bytes=24 * GIB, others_bytes=others) for others in (0, 3 * GIB))
    for one, other in zip((*alone.phases, alone.export), (*beside.phases, beside.export), strict=True):
        assert other.bytes == one.bytes | {"other processes": 3 * GIB}
        assert other.tensor_bytes == one.tensor_bytes
    assert beside.sequences_at_once == alone.sequences_at_once
    # Exactly as much as fits: one byte more does not, and vLLM's share is no smaller for it.
    room = 24 * GIB - alone.peak.total_bytes
    assert plan_memory(recipe, shape, vram_bytes=24 * GIB, others_bytes=room).fits
    assert not plan_memory(recipe, shape, vram_bytes=24 * GIB, others_bytes=room + 1).fits
    advice = advice_for(MemoryPlan(recipe, shape, Machine(24 * GIB, room + 1)))
    assert advice.values == {"rollout.vllm.gpu_memory_utilization": 0.3}


def test_a_run_beyond_the_models_context_is_refused() -> None:
    long = ("rollout.max_completion_length=8192", "train.tokens_per_microbatch=9000")
    with pytest.raises(UserInputError, match=r"512 \+ 8192 = 8704 tokens, and the context of .* is 4096") as caught:
        plan_of(recipe_of("1_5b", *long))
    assert caught.value.next_step is not None
    override = caught.value.next_step.removeprefix("--set ")
    plan = plan_of(recipe_of("1_5b", *long, override))
    assert plan.sequence_tokens == plan.context_tokens
    prompts = ("rollout.max_prompt_length=4096", "train.tokens_per_microbatch=9000")
    with pytest.raises(UserInputError) as caught:
        plan_of(recipe_of("1_5b", *prompts))
    assert caught.value.next_step == "set rollout.max_prompt_length below 4096"


def test_only_what_the_objective_needs_is_passed_without_a_graph() -> None:
    off = ("objective.similarity_coef=0.0", "objective.entropy_coef=0.0")
    grpo, raft = ("objective.algorithm=grpo",), ("objective.algorithm=raft",)

    def siamese(*options: str) -> dict[str, int]:
        return in_phase(recipe_of("1_5b", "rollout.engine=hf", *options), "siamese")

    def update(*options: str) -> dict[str, int]:
        return in_phase(recipe_of("1_5b", "rollout.engine=hf", *options), "update")

    passed = {"hidden states"}
    assert {*passed, "layer working set"} <= siamese().keys()
    for options in (grpo, raft, off):
        assert not passed & siamese(*options).keys()
        assert {"predictor head", "siamese average"} <= siamese(*options).keys()
    assert passed <= siamese(*off, "objective.weights_from=trainer").keys()
    assert passed <= in_phase(recipe_of("1_5b", *grpo), "siamese").keys()  # an engine's log-probs are checked
    with_kl = (*grpo, "objective.kl_coef=0.04")
    # 32 x 8 answers, float32: a target of D numbers each, or a log-prob for each of 1,024 tokens.
    targets, logps = 4 * 256 * 1536, 4 * 256 * 1024
    row = 2 * 8192 * 1536  # the base's pass is fullest in the LM head, when the embeddings are gone
    assert siamese()["hidden states"] - siamese(*with_kl)["hidden states"] == targets - logps + row
    assert update()["hidden states"] - update(*grpo)["hidden states"] == targets
    assert update(*with_kl)["hidden states"] - update(*grpo)["hidden states"] == logps


def test_auto_plans_the_trainers_own_model_if_vllm_could_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("vllm", None, origin="somewhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    for options, engine in (((), "vllm"), (("lora.rank=513",), "hf"), (("lora.dora=true",), "hf")):
        assert plan_of(recipe_of("1_5b", "rollout.engine=auto", *options)).engine == engine


def test_a_share_that_holds_no_sequence_does_not_fit_although_the_peak_would() -> None:
    plan = plan_of(recipe_of("1_5b"), 8)
    assert plan.peak.total_bytes < plan.vram_bytes
    assert plan.engine_shortfall_bytes > 0
    assert not plan.fits
    assert plan.longest_sequence_tokens == 0
    fp8, auto = (plan_of(recipe_of("1_5b", f"rollout.vllm.kv_cache_dtype={kind}")) for kind in ("fp8", "auto"))
    assert fp8.sequences_at_once in (2 * (auto.sequences_at_once or 0), 2 * (auto.sequences_at_once or 0) + 1)


def test_the_models_own_decoding_grows_with_its_batch_and_a_server_takes_nothing() -> None:
    small, large = (
        in_phase(recipe_of("1_5b", "rollout.engine=hf", f"rollout.max_num_seqs={size}"), "rollout") for size in (32, 64)
    )
    assert large["KV cache"] == 2 * small["KV cache"]
    plan = plan_of(recipe_of("1_5b", "rollout.engine=hf"))
    fitting = plan.sequences_at_once
    assert fitting is not None
    for size, fits in ((fitting, True), (fitting + 1, False)):
        assert plan_of(recipe_of("1_5b", "rollout.engine=hf", f"rollout.max_num_seqs={size}")).fits is fits
    served = recipe_of(
        "1_5b",
        "rollout.engine=server",
        'rollout.server.base_urls=["https://x"]',
        "rollout.server.shared_dir=/x",
        "rollout.vllm.enable_sleep_mode=false",
    )
    assert plan_of(served).sequences_at_once is None
    assert not {"KV cache", "engine weights"} & in_phase(served, "rollout").keys()


def test_the_loss_takes_its_chunk_and_no_logits_of_a_batch() -> None:
    long = ("train.tokens_per_microbatch=8192", "train.logits_mib=2048")
    update = in_phase(recipe_of("1_5b", *long), "update")
    chunk = chunk_tokens(151_936, memory_bytes=2**31)
    assert 1 < update["loss chunk"] / (chunk * 151_936 * 4) < 1.1


def test_the_longest_sequence_is_the_longest_that_fits() -> None:
    recipe = recipe_of("1_5b")
    longest = plan_of(recipe).longest_sequence_tokens
    for tokens, fits in ((longest, True), (longest + 1, False)):
        tried = recipe_of(
            "1_5b", f"rollout.max_completion_length={tokens - 512}", f"train.tokens_per_microbatch={tokens}"
        )
        assert (MemoryPlan(tried, load_shape(tried.model), Machine(24 * GIB)).overrun_bytes == 0) is fits


def test_the_export_answers_at_most_sixteen_at_once_and_scores_one() -> None:
    plan = plan_memory(recipe := load_recipe("r1_distill_1_5b_lora"), load_shape(recipe.model), vram_bytes=24 * GIB)
    assert plan.export.bytes["KV cache"] >= 16 * plan.sequence_tokens * 28 * 2 * 256 * 2
    fewer = plan.with_values({"rollout.max_num_seqs": 4}).export
    assert fewer.bytes["KV cache"] < plan.export.bytes["KV cache"] / 3
    assert plan.with_values({"rollout.max_num_seqs": 64}).export == plan.export


def test_a_recipe_on_the_cpu_has_no_cuda_context(tiny_recipe: Callable[..., Recipe]) -> None:
    plan = plan_of(tiny_recipe())
    assert not plan.on_gpu
    assert not any("CUDA context" in phase.bytes for phase in (*plan.phases, plan.export))


# ---------------------------------------------------------------------- advice


@pytest.mark.parametrize("gib", [8, 12, 16, 24])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ("1_5b", ()),
        ("7b", ()),
        ("7b", ("rollout.vllm.base=dequantized", "rollout.vllm.gpu_memory_utilization=0.35")),
        ("1_5b", ("model.quantization=none", "rollout.engine=hf", "optimizer.name=adamw")),
        ("1_5b", ("train.gradient_checkpointing=false", "rollout.vllm.enable_sleep_mode=false")),
    ],
)
def test_advice_really_fits_and_no_change_of_it_is_needless(size: str, options: tuple[str, ...], gib: int) -> None:
    recipe = recipe_of(size, *options)
    shape, vram = load_shape(recipe.model), gib * GIB
    advice = advice_for(MemoryPlan(recipe, shape, Machine(vram)))
    assert advice.smallest_vram_bytes is None
    if MemoryPlan(recipe, shape, Machine(vram)).overrun_bytes == 0:
        assert advice.changes == ()
        return
    copied = shlex.split(advice.next_step)
    assert copied[::2] == ["--set"] * len(advice.values)
    advised = recipe_of(size, *options, *copied[1::2])
    plan = plan_memory(advised, load_shape(advised.model), vram_bytes=vram)
    assert plan.fits
    assert advice.changes[-1]["peak_bytes"] == plan.peak.total_bytes
    for change in advice.changes:
        assert change["after_bytes"] < change["before_bytes"]
        assert change["before_bytes"] > (0 if change["eases"] == SHORTFALL else vram)
    for left_out in range(len(advice.changes)):
        others = advice.changes[:left_out] + advice.changes[left_out + 1 :]
        values = {key: value for change in others for key, value in change["values"].items()}
        partly = recipe_of(size, *options, *(f"{key}={json.dumps(value)}" for key, value in values.items()))
        assert not plan_memory(partly, shape, vram_bytes=vram).fits


def test_if_nothing_helps_the_smallest_memory_is_named() -> None:
    recipe = recipe_of("7b")
    shape = load_shape(recipe.model)
    advice = advice_for(MemoryPlan(recipe, shape, Machine(4 * GIB)))
    assert advice.changes == ()
    smallest = advice.smallest_vram_bytes
    assert smallest is not None
    assert 4 * GIB < smallest < 8 * GIB
    assert advice_for(MemoryPlan(recipe, shape, Machine(smallest))).changes
    assert advice_for(MemoryPlan(recipe, shape, Machine(smallest - 2**29))).changes == ()


def test_adapters_keep_their_scale_when_their_rank_is_lowered() -> None:
    recipe = recipe_of("1_5b")
    ranks = reductions(recipe)["rank"]
    assert [values["lora.alpha"] / values["lora.rank"] for values in ranks] == [2.0, 2.0, 2.0]


# ---------------------------------------------------------------------- before a run


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the card's GiB, `used` of them by other processes and by this process's CUDA context. The host has 64 GiB."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(advice, "available_bytes", lambda: 64 * GIB)

    def make(total: float, used: float = 0) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (round((total - used) * GIB), round(total * GIB)))

    return make


def test_a_run_that_does_not_fit_is_refused_with_options_to_copy(gpu: Callable[..., None]) -> None:
    recipe = recipe_of("7b")
    gpu(24)
    refuse_without_room(recipe, pytest.fail)
    gpu(12)
    with pytest.raises(UserInputError) as caught:
        refuse_without_room(recipe, pytest.fail)
    error = caught.value
    assert "12.00 GiB" in error.what
    assert "in the phase rollout" in error.what
    assert error.next_step is not None
    refuse_without_room(recipe_of("7b", *shlex.split(error.next_step)[1::2]), pytest.fail)
    gpu(8)
    with pytest.raises(UserInputError, match="gpu_memory_utilization = 0.35"):
        refuse_without_room(recipe_of("1_5b"), pytest.fail)


def test_what_others_hold_counts(gpu: Callable[..., None]) -> None:
    gpu(24, used=14)
    with pytest.raises(UserInputError, match=r"beside 13\.41 GiB of other processes .* there are 24\.00 GiB"):
        refuse_without_room(recipe_of("7b"), pytest.fail)


def test_the_engines_share_is_of_the_card_and_not_of_what_others_leave(gpu: Callable[..., None]) -> None:
    """0.85 of 24 GiB and what is loaded before do not fit in 21.5; 0.85 of 21.5 would."""
    recipe = recipe_of("1_5b", "rollout.vllm.gpu_memory_utilization=0.85")
    gpu(21.5)
    refuse_without_room(recipe, pytest.fail)
    gpu(24, used=0.5)  # this process's own context is counted once
    refuse_without_room(recipe, pytest.fail)
    gpu(24, used=2.5)
    with pytest.raises(UserInputError, match="in the phase rollout"):
        refuse_without_room(recipe, pytest.fail)


def test_a_run_on_the_cpu_is_not_refused_but_warned(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(1)
    refuse_without_room(recipe_of("7b", "train.device=cpu", "rollout.engine=hf"), pytest.fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuse_without_room(recipe_of("7b", "rollout.engine=hf"), pytest.fail)
    monkeypatch.setattr(advice, "available_bytes", lambda: 8 * GIB)
    messages: list[str] = []
    refuse_without_room(recipe_of("7b", "rollout.engine=hf"), messages.append)
    [said] = messages
    assert said.startswith("host memory may run out: the run is planned to need ")
    assert "there are 8.00 GiB" in said


# ---------------------------------------------------------------------- host memory


def test_a_sleeping_engines_weights_are_pinned_in_powers_of_two() -> None:
    """The figures of Qwen2.5-7B: 152,064 x 3,584 twice; q, k, v joined; gate and up joined."""
    host = plan_of(recipe_of("7b", "rollout.vllm.base=dequantized")).host
    mib, norms = 2**20, 28 * (2 * 3584 + 4608) + 3584
    assert host["engine asleep"] == (2 * 2048 + 28 * (32 + 32 + 512 + 256)) * mib + 2 * norms
    assert plan_of(recipe_of("7b")).host["engine asleep"] == (2 * 2048 + 28 * (16 + 8 + 128 + 64)) * mib + 2 * norms
    awake = plan_of(recipe_of("7b", "rollout.vllm.enable_sleep_mode=false")).host
    assert not {"engine asleep", "optimizer state"} & awake.keys()


def test_host_memory_holds_what_leaves_the_gpu() -> None:
    shared, paged, offloaded = (
        plan_of(recipe_of("1_5b", *options)).host
        for options in ((), ("optimizer.name=paged_adamw8bit",), ("train.offload_activations=true",))
    )
    assert shared["optimizer state"] == in_phase(recipe_of("1_5b"), "step")["optimizer state"]
    # Large tensors' 8-bit moments move to the host, wherever the rest is.
    assert paged["optimizer state"] == pytest.approx(shared["optimizer state"], rel=0.01)
    assert "layer inputs" not in shared
    assert offloaded["layer inputs"] == 28 * 2**25  # 8,192 x 1,536 x 2 bytes, rounded up
    assert plan_of(recipe_of("1_5b", "train.device=cpu", "rollout.engine=hf", "optimizer.name=adamw")).host == {}


def test_too_little_host_memory_is_refused_with_what_to_change(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("7b")
    gpu(24)
    monkeypatch.setattr(advice, "available_bytes", lambda: 12 * GIB)
    with pytest.raises(UserInputError, match=r"need 14\.\d\d GiB of host memory .*engine asleep 9\.91 GiB") as caught:
        refuse_without_room(recipe, pytest.fail)
    assert caught.value.where == HOST
    assert caught.value.next_step is not None
    refuse_without_room(recipe_of("7b", *shlex.split(caught.value.next_step)[1::2]), pytest.fail)
    monkeypatch.setattr(advice, "available_bytes", lambda: GIB)
    with pytest.raises(UserInputError, match="host memory") as caught:
        refuse_without_room(recipe, pytest.fail)
    assert caught.value.next_step is not None
    assert caught.value.next_step.endswith("GiB of host memory")


def test_a_large_model_of_ones_own_is_first_served_in_4_bits() -> None:
    own = recipe_of("7b", "rollout.vllm.base=dequantized", "rollout.vllm.gpu_memory_utilization=0.35")
    assert advice_for(plan_of(own)).values["rollout.vllm.base"] == "nf4"
    small = recipe_of("1_5b", "rollout.vllm.gpu_memory_utilization=0.1")
    assert "rollout.vllm.base" not in advice_for(plan_of(small)).values


def test_a_run_whose_config_cannot_be_read_goes_on_and_says_so(gpu: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    gpu(24)
    messages: list[str] = []
    refuse_without_room(recipe_of("1_5b", f'model.id="{tmp_path}"'), messages.append)
    assert len(messages) == 1
    assert "no memory plan: the config lacks" in messages[0]


def test_memory_advice_names_what_is_left_to_change(tiny_recipe: Callable[..., Recipe]) -> None:
    first = memory_advice(recipe_of("1_5b", "train.gradient_checkpointing=false"))
    assert first.splitlines() == [
        "resume with one of:",
        "  --set train.gradient_checkpointing=true",
        "  --set train.offload_activations=true --set train.gradient_checkpointing=true",
        "  --set train.logits_mib=128",
        "in a new run, which may start from this one's adapter (lora.init_from), use one of:",
        "  --set optimizer.name=paged_adamw8bit",
        "  --set lora.rank=16 --set lora.alpha=32.0",
        "  --set rollout.max_completion_length=512 --set train.tokens_per_microbatch=1024",
    ]
    spent = recipe_of(
        "1_5b",
        "train.offload_activations=true",
        "train.logits_mib=32",
        "optimizer.name=paged_adamw8bit",
        "lora.rank=4",
        "rollout.max_completion_length=256",
    )
    assert memory_advice(spent) == "train on a GPU with more memory"
    assert "offload" not in memory_advice(tiny_recipe())


# ---------------------------------------------------------------------- ranks


def rank_of(recipe: Recipe, ranks: int, gib: float = 24) -> MemoryPlan:
    return plan_memory(recipe, load_shape(recipe.model), vram_bytes=round(gib * GIB), ranks=ranks)


def test_a_rank_samples_and_trains_on_its_share_of_the_prompts(tiny_recipe: Callable[..., Recipe]) -> None:
    """Three ranks have 11, 11 and 10 of 32 prompts, and 67 of 200 problems of an evaluation."""
    whole, few = "rollout.max_num_seqs=256", ("rollout.max_num_seqs=88", "data.prompts_per_step=11")
    for phase, alone in zip(rank_of(tiny_recipe(whole), 3).phases, plan_of(tiny_recipe(*few)).phases, strict=True):
        assert phase == alone
    rollout = rank_of(tiny_recipe(whole, "eval.problems=0"), 3).phases[1].bytes
    kv, layer = 2 * 2 * 2 * 32 * 4, 2 * 4 * 32 * 4  # bytes of a token's keys and values: all, one layer's repeated
    assert rollout["KV cache"] == 88 * 128 * (kv + layer)  # full, and growing
    assert rank_of(tiny_recipe(whole), 3).answers == 88
    assert rank_of(tiny_recipe(whole), 64).answers == 8
    one, four = (rank_of(tiny_recipe(whole), ranks).sequences_at_once or 0 for ranks in (1, 4))
    assert one == four > 256  # of the card, not of the share


def test_the_gradients_of_all_ranks_are_summed_in_one_bucket(tiny_recipe: Callable[..., Recipe]) -> None:
    small = ("data.prompts_per_step=1", "rollout.num_generations=2", "rollout.max_completion_length=4")
    recipe = tiny_recipe(*small, "siamese.head_width=100000")
    adapters = 2 * 16 * (256 + 192 + 192 + 256 + 512 + 512 + 512)
    head = 2 * 128 * 100_000 + 3 * 100_000 + 128
    alone, update = (next(p for p in rank_of(recipe, ranks).phases if p.name == "update") for ranks in (1, 2))
    assert update.moment == "gradients are summed over ranks"
    assert update.bytes["gradient bucket"] == update.bytes["gradients"] == 4 * (adapters + head)
    assert "gradient bucket" not in alone.bytes
    without = tiny_recipe(*small, "siamese.head_width=100000", "objective.algorithm=grpo")
    assert "gradient bucket" not in rank_of(without, 2).phases[3].bytes  # 0.3 MiB is not the fullest


def test_nccl_is_there_from_the_first_sum_on() -> None:
    recipe = recipe_of("1_5b")
    alone, rank = plan_of(recipe), rank_of(recipe, 8)
    for one, other in zip((*alone.phases, alone.export), (*rank.phases, rank.export), strict=True):
        expected = 0 if one.name in ("load", "export") else NCCL_BYTES
        assert other.bytes.get("NCCL", 0) == expected
        assert other.tensor_bytes <= one.tensor_bytes
    assert rank.phases[4].total_bytes == alone.phases[4].total_bytes + NCCL_BYTES


@pytest.mark.parametrize("engine", ["hf", "server"])
def test_ranks_divide_the_frozen_layers_and_gather_what_they_compute(engine: str) -> None:
    server = ('rollout.server.base_urls=["http://localhost:8000"]', "rollout.server.shared_dir=/tmp")
    recipe = recipe_of("7b", f"rollout.engine={engine}", *(server if engine == "server" else ()))
    whole, shape = rank_of(recipe, 4), load_shape(recipe.model)
    recipe = recipe.with_values({"distributed.strategy": "fsdp2"})
    sharded = rank_of(recipe, 4)
    assert rank_of(recipe, 1).policy == whole.policy  # nothing to divide
    # Packed, two weights are a byte; scales of scales stay whole.
    packed, norms = sum(one.inputs * one.outputs for one in shape.linears()) * 28 // 2, 28 * (2 * 3584 + 4608) * 2
    assert sharded.policy["base linears"] == whole.policy["base linears"] - packed * 3 // 4
    assert sharded.policy["norms, biases"] == norms / 4 + 2 * 3584
    assert all(sharded.policy[name] == whole.policy[name] for name in ("embeddings", "LM head", "adapters"))
    layer = (packed + norms) // 28
    gathered = {"load": layer, "rollout": 28 * layer if engine == "hf" else 2 * layer}
    gathered |= {"siamese": 2 * layer, "update": 2 * layer}
    assert {p.name: p.bytes["gathered layers"] for p in sharded.phases if "gathered layers" in p.bytes} == gathered
    assert "weight in 16 bit" not in sharded.phases[0].bytes
    assert sharded.host["base"] == sum(whole.policy.values()) - whole.trained  # read there by every rank
    assert sharded.export == whole.export


def test_a_base_is_divided_before_what_changes_learning() -> None:
    urls = 'rollout.server.base_urls=["http://localhost:8000"]'
    recipe = recipe_of("7b", "rollout.engine=server", urls, "rollout.server.shared_dir=/tmp")
    assert "distributed.strategy" not in advice_for(rank_of(recipe, 8, 9)).values  # a whole base fits
    found = advice_for(rank_of(recipe, 8, 7)).values
    assert found["distributed.strategy"] == "fsdp2"
    assert {key.partition(".")[0] for key in found} <= {"distributed", "train", "optimizer"}
    assert rank_of(recipe.with_values(found), 8, 7).fits
    assert "distributed.strategy" not in advice_for(rank_of(recipe, 1, 7)).values
    assert not reductions(recipe_of("7b", "rollout.engine=hf"))["divided base"]


def test_the_ranks_of_a_machine_share_its_host_memory(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("7b")
    gpu(24)
    monkeypatch.setattr(advice, "available_bytes", lambda: 32 * GIB)
    refuse_without_room(recipe, pytest.fail)  # 14.3 GiB
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    refuse_without_room(recipe, pytest.fail)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")  # accelerate launch may not set it: all on this machine
    with pytest.raises(UserInputError, match=r"need 57\.\d\d GiB of host memory .* for each of 4 ranks") as caught:
        refuse_without_room(recipe, pytest.fail)
    assert caught.value.where == HOST
    assert caught.value.next_step is not None
    refuse_without_room(recipe_of("7b", *shlex.split(caught.value.next_step)[1::2]), pytest.fail)


def test_ranks_on_a_cpu_share_its_memory(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(1)
    recipe, messages = recipe_of("1_5b", "train.device=cpu", "rollout.engine=hf", "rollout.max_num_seqs=8"), []
    needed = plan_memory(recipe, load_shape(recipe.model), vram_bytes=GIB, ranks=2).peak.total_bytes
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(advice, "available_bytes", lambda: 2 * needed)
    refuse_without_room(recipe, pytest.fail)
    monkeypatch.setattr(advice, "available_bytes", lambda: 2 * needed - 2)
    refuse_without_room(recipe, messages.append)
    assert len(messages) == 1


# ---------------------------------------------------------------------- shapes and GPUs


def test_unknown_architectures_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match="'gemma3'") as caught:
        shape_of({"model_type": "gemma3"})
    assert "popo-lite plan simulates it; known are qwen2, qwen3, llama, mistral, smollm3" in str(caught.value)
    with pytest.raises(ModelError, match="lacks num_hidden_layers"):
        shape_of(
            {
                "model_type": "qwen2",
                "hidden_size": 1,
                "intermediate_size": 1,
                "num_attention_heads": 1,
                "vocab_size": 1,
                "max_position_embeddings": 1,
            }
        )


CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "holds a list"),
        ("null", "holds a NoneType"),
        (json.dumps({**CONFIG, "model_type": None}), "model_type is None"),
        (json.dumps({**CONFIG, "model_type": ["llama"]}), r"model_type is \['llama'\]"),
        (json.dumps({**CONFIG, "num_attention_heads": 0}), "num_attention_heads is 0"),
        (json.dumps({**CONFIG, "hidden_size": "64"}), "hidden_size is '64'"),
        (json.dumps({**CONFIG, "num_hidden_layers": -2}), "num_hidden_layers is -2"),
        (json.dumps({**CONFIG, "num_key_value_heads": True}), "num_key_value_heads is True"),
        (json.dumps({**CONFIG, "head_dim": 16.0}), r"head_dim is 16\.0"),
        (json.dumps({**CONFIG, "num_attention_heads": 5}), "num_attention_heads is 5, which does not divide"),
        (json.dumps({**CONFIG, "tie_word_embeddings": "false"}), "tie_word_embeddings is 'false'"),
        (json.dumps({**CONFIG, "quantization_config": {"quant_method": "awq"}}), r"quantised already \(awq\)"),
        (json.dumps({**CONFIG, "quantization_config": {}}), "quantised already"),
        (json.dumps({"model_type": "gemma3_text", "quantization_config": {}}), "quantised already"),
    ],
)
def test_a_config_that_no_model_has_is_refused_with_file_and_key(
    tmp_path: Path, tiny_recipe: Callable[..., Recipe], text: str, said: str
) -> None:
    path = tmp_path / "config.json"
    model = tiny_recipe().model.model_copy(update={"id": str(tmp_path)})
    path.write_text(json.dumps(CONFIG | {"quantization_config": None}))
    assert load_shape(model).head_width == 16
    path.write_text(text)
    with pytest.raises(ModelError, match=said) as caught:
        load_shape(model)
    assert caught.value.where == str(path)
    assert caught.value.next_step


def test_a_folders_config_is_read_and_a_broken_one_refused(tmp_path: Path, tiny_recipe: Callable[..., Recipe]) -> None:
    tiny = tiny_recipe().model
    config: dict[str, Any] = json.loads((RECIPES.parent / "popo_lite/policy/tiny/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    local = tiny.model_copy(update={"id": str(tmp_path)})
    assert load_shape(local) == load_shape(tiny)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        load_shape(local)


def test_a_name_that_only_the_hub_knows_is_refused_offline(tiny_recipe: Callable[..., Recipe]) -> None:
    unknown = tiny_recipe().model.model_copy(update={"id": "nobody/nothing"})
    with pytest.raises(ModelError, match="nobody/nothing") as caught:
        load_shape(unknown)
    assert "Qwen/Qwen2.5-Math-7B" in str(caught.value)


def test_targets_match_as_in_peft() -> None:
    shape = load_shape(recipe_of("1_5b").model)
    assert len(list(adapted_linears(shape, "all-linear"))) == 7 * 28
    assert len(list(adapted_linears(shape, ("q_proj", "mlp.up_proj")))) == 2 * 28
    assert len(list(adapted_linears(shape, ("layers.3.self_attn.v_proj",)))) == 1
    with pytest.raises(ModelError, match="proj is no linear layer"):
        list(adapted_linears(shape, ("proj",)))


def test_the_gpu_is_asked_for_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def answer(text: str | Exception) -> Callable[..., subprocess.CompletedProcess[str]]:
        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            asked.append(command)
            if isinstance(text, Exception):
                raise text
            return subprocess.CompletedProcess(command, 0, stdout=text)

        return run

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(subprocess, "run", answer("24564, 812, 8.9\n81559, 3, 9.0\n"))
    assert installed_gpu() == (24564 * 2**20, 812 * 2**20, (8, 9))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    installed_gpu()
    assert asked[-1][-1] == "--id=1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert installed_gpu() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for failure in (
        FileNotFoundError(),
        subprocess.CalledProcessError(9, "nvidia-smi"),
        "[N/A], [N/A], 8.9",
        "24564, 812",
        "",
    ):
        monkeypatch.setattr(subprocess, "run", answer(failure))
        assert installed_gpu() is None
