"""Compare the memory plan with counted tensors of real models, NF4, PEFT adapters and optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from popo_lite.policy.adapters import add_adapters
from popo_lite.policy.attention import enable_packing, layout, positions
from popo_lite.policy.load import load_base
from popo_lite.policy.policy import Policy, load_policy
from popo_lite.policy.siamese import Siamese
from popo_lite.recipe import Recipe
from popo_lite.samplers.base import SamplingParams
from popo_lite.samplers.hf import HFSampler
from popo_lite.tools.plan.shapes import (
    KNOWN_CONFIGS,
    ModelShape,
    load_shape,
    parameter_counts,
    shape_of,
)
from popo_lite.tools.plan.terms import (
    LayerBytes,
    adapter_elements,
    base_bytes,
    hf_moments,
    nf4_bytes,
    optimizer_bytes,
    predictor_elements,
)
from popo_lite.tools.plan.vram import plan_memory
from popo_lite.types import Problem, Prompt
from popo_lite.update import build_optimizer

SMALL = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "max_position_embeddings": 512,
}
UPDATE_CLASSES = ("layer inputs", "layer activations", "layer working set", "hidden states")
WIDER = SMALL | {"hidden_size": 256, "intermediate_size": 1408, "num_attention_heads": 4, "head_dim": 48}


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the distinct storages behind `tensors`."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _has_storage(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_mkldnn


class LiveStorages(TorchDispatchMode):
    """Count the bytes of live storages that operations inside it have made, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _has_storage(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if _has_storage(tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._alive and key not in given:
                    self._alive[key] = size
                    self.now += size
                    weakref.finalize(storage, self._freed, key, size)
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key: int, size: int) -> None:
        if self._alive.pop(key, None) is not None:
            self.now -= size


# ---------------------------------------------------------------------- parameters and what they take


@pytest.mark.parametrize("name", KNOWN_CONFIGS)
def test_known_models_have_the_parameters_that_transformers_builds(name: str) -> None:
    config = KNOWN_CONFIGS[name]
    built = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(built)
    shape = shape_of(config)
    assert shape == shape_of(built.to_dict())
    assert sum(parameter_counts(shape).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "qwen3", "tie_word_embeddings": False, "attention_bias": True},
        {"model_type": "qwen3", "tie_word_embeddings": True},
        {"model_type": "llama", "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
        {"model_type": "mistral", "tie_word_embeddings": False},
        {
            "model_type": "smollm3",
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "pad_token_id": 0,
        },
    ],
)
def test_every_understood_architecture_is_counted_by_class(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL, **config))
    counts = parameter_counts(shape_of(SMALL | config))
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    assert counts["base linears"] == sum(linear.weight.numel() for linear in linears)
    assert counts["embeddings"] == model.get_input_embeddings().weight.numel()
    assert counts["LM head"] == (0 if config["tie_word_embeddings"] else head.weight.numel())
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral"])
def test_keys_that_a_config_leaves_out_mean_what_transformers_takes_them_for(kind: str) -> None:
    optional = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias")
    config = {"model_type": kind, "hidden_size": 4096, "num_attention_heads": 32}
    config |= {key: SMALL[key] for key in SMALL if key not in (*optional, *config)}
    assert shape_of(config) == shape_of(AutoConfig.for_model(**config).to_dict())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(96, 64), (128, 384), (1000, 520), (7, 64)])
def test_nf4_takes_what_bitsandbytes_stores(shape: tuple[int, int], double: bool) -> None:
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(torch.randn(shape), quant_type="nf4", compress_statistics=double)
    parts = [packed, state.absmax, state.code]
    if double:
        parts += [state.offset, state.state2.absmax, state.state2.code]
    assert nf4_bytes(shape[0] * shape[1], double=double) == nbytes(parts)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_optimizer_state_takes_what_the_optimizers_hold(tiny_recipe: Callable[..., Recipe], name: str) -> None:
    recipe = tiny_recipe(f"optimizer.name={name}", "siamese.head_width=64")
    policy = load_policy(recipe)
    shape = load_shape(recipe.model)
    elements = adapter_elements(shape, recipe.lora) + predictor_elements(shape, 64)
    parameters = [parameter for _, parameter in policy.trainable_parameters()]
    assert sorted(elements) == sorted(parameter.numel() for parameter in parameters)
    optimizer = build_optimizer(policy, recipe.optimizer)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tables = ("qmap1", "qmap2", "step")
    held = [
        value
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key not in tables
    ]
    assert optimizer_bytes(elements, recipe) == nbytes(held)


def test_paged_state_leaves_scales_and_small_tensors_on_the_gpu(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("train.device=auto", "optimizer.name=paged_adamw8bit")
    assert optimizer_bytes([200_000], recipe) == 8 * 782
    assert optimizer_bytes([99_999], recipe) == 2 * 99_999 + 8 * 391
    assert optimizer_bytes([4_095], recipe) == 8 * 4_095


# ---------------------------------------------------------------------- one layer's activations


def counted_layer(recipe: Recipe, config: dict[str, Any], folder: Path, tokens: int) -> tuple[LayerBytes, list[int]]:
    """Return a layer's plan, and the counted bytes [saved, peak in the backward pass, peak without a graph]."""
    torch.manual_seed(0)
    built = AutoConfig.for_model(**config)
    dtype = getattr(torch, recipe.model.dtype)
    AutoModelForCausalLM.from_config(built).to(dtype).save_pretrained(folder)
    model_recipe = recipe.model.model_copy(update={"id": str(folder)})
    model: Any = add_adapters(load_base(model_recipe, torch.device("cpu")), recipe.lora, 0)
    decoder = model.get_base_model().model
    mask = None
    if recipe.model.attn_implementation == "sdpa":
        enable_packing(model.get_base_model())
        mask = layout([(tokens,)])
    layer = decoder.layers[1].train()
    hidden = torch.randn(1, tokens, built.hidden_size, dtype=dtype, requires_grad=True)
    rotary = decoder.rotary_emb(hidden, torch.arange(tokens)[None])

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            result: torch.Tensor = layer(hidden, position_embeddings=rotary, attention_mask=mask)
        return result

    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), hidden, *rotary)}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    counts = [nbytes(saved.values())]
    gradient = torch.randn_like(output)
    del output
    saved.clear()
    with LiveStorages() as live:
        forward().backward(gradient)
    counts.append(live.peak)
    with LiveStorages() as live, torch.no_grad():
        forward()
    counts.append(live.peak)
    return LayerBytes(recipe, shape_of(config)), counts


@pytest.fixture
def cuda_like_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer for the CPU if PEFT asks whether autocast is on: it names no device, which means CUDA."""
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": asked(device))


@pytest.mark.usefixtures("cuda_like_autocast")
@pytest.mark.parametrize("config", [SMALL, WIDER])
@pytest.mark.parametrize(
    "overrides",
    [
        ("model.dtype=bfloat16",),
        ("model.dtype=float32",),
        ("model.dtype=bfloat16", "model.quantization=none"),
        ("model.dtype=bfloat16", 'lora.target_modules=["q_proj", "v_proj"]'),
        ("model.dtype=bfloat16", 'lora.target_modules=["down_proj"]'),
        ("model.dtype=bfloat16", "lora.dropout=0.1"),
        ("model.dtype=float32", "lora.dropout=0.1"),
    ],
)
def test_a_layer_takes_what_was_counted(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, config: dict[str, Any], overrides: tuple[str, ...]
) -> None:
    recipe, tokens = tiny_recipe("lora.rank=8", *overrides), 384
    planned, counts = counted_layer(recipe, {"model_type": "qwen2", **config}, tmp_path, tokens)
    assert planned.saved * tokens + planned.casts_bytes == pytest.approx(counts[0], rel=0.02)
    assert planned.peak_bytes(tokens, tokens, backward=True) == pytest.approx(counts[1], rel=0.02)
    assert planned.peak_bytes(tokens, tokens, backward=False) == pytest.approx(counts[2], rel=0.02)


@pytest.mark.usefixtures("cuda_like_autocast")
@pytest.mark.parametrize("kind", ["qwen3", "llama", "mistral"])
def test_a_layer_of_the_other_architectures_does_too(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, kind: str
) -> None:
    recipe, tokens = tiny_recipe("lora.rank=8", "model.dtype=bfloat16"), 384
    planned, counts = counted_layer(recipe, {"model_type": kind, **WIDER}, tmp_path, tokens)
    assert planned.saved * tokens + planned.casts_bytes == pytest.approx(counts[0], rel=0.02)
    assert planned.peak_bytes(tokens, tokens, backward=True) == pytest.approx(counts[1], rel=0.02)


@pytest.mark.usefixtures("cuda_like_autocast")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_eager_attention_takes_the_square_and_the_plan_is_no_less(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, dtype: str
) -> None:
    recipe, tokens = tiny_recipe("lora.rank=8", f"model.dtype={dtype}", "model.attn_implementation=eager"), 512
    planned, counts = counted_layer(recipe, {"model_type": "qwen2", **SMALL}, tmp_path, tokens)
    saved = (planned.saved + planned.pair * tokens) * tokens + planned.casts_bytes
    assert saved == pytest.approx(counts[0], rel=0.1)
    assert counts[1] <= planned.peak_bytes(tokens, tokens, backward=True)
    assert counts[2] <= planned.peak_bytes(tokens, tokens, backward=False)


@pytest.mark.usefixtures("cuda_like_autocast")
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("block", [(256, 256), (128, 96, 96, 96, 96)])
def test_the_update_of_a_whole_trunk_takes_what_was_planned(
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    quantization: str,
    dtype: str,
    checkpointing: str,
    block: tuple[int, ...],
) -> None:
    prompt, *answers = block
    tokens = sum(block)
    config = {"model_type": "qwen2", **WIDER, "vocab_size": 64, "num_hidden_layers": 4}
    recipe = tiny_recipe(
        "lora.rank=2",
        f"model.dtype={dtype}",
        f"model.quantization={quantization}",
        f"train.gradient_checkpointing={checkpointing}",
        f"train.tokens_per_microbatch={tokens}",
        f"rollout.max_prompt_length={prompt}",
        f"rollout.max_completion_length={answers[0]}",
        "data.prompts_per_step=1",
        f"rollout.num_generations={max(2, len(answers))}",
        f"train.shared_prefix={str(len(answers) > 1).lower()}",
    )
    torch.manual_seed(0)
    wanted = getattr(torch, dtype)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).to(wanted).save_pretrained(tmp_path)
    base = load_base(recipe.model.model_copy(update={"id": str(tmp_path)}), torch.device("cpu"))
    model: Any = add_adapters(base, recipe.lora, 0)
    if recipe.train.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    enable_packing(base)
    shared = {"attention_mask": layout([block]), "position_ids": positions([block], torch.device("cpu"))}
    trunk = model.train().get_base_model().model
    ids = torch.randint(0, 64, (1, tokens))
    # The gradient is made before, and stands for the hidden states, which are alive instead.
    gradient = torch.randn(1, tokens, WIDER["hidden_size"], dtype=wanted)
    with LiveStorages() as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            hidden = trunk(input_ids=ids, use_cache=False, **shared).last_hidden_state
        hidden.backward(gradient)
    plan = plan_memory(recipe, shape_of(config), vram_bytes=2**34)
    update = next(phase for phase in plan.phases if phase.name == "update")
    assert update.moment == "the top layer's backward pass"
    planned = sum(update.bytes[name] for name in UPDATE_CLASSES if name in update.bytes)
    assert planned == pytest.approx(live.peak, rel=0.02)


@pytest.fixture
def peft_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the LoRA layers as on a GPU, which is what the plan counts."""
    monkeypatch.setattr("popo_lite.policy.policy.merge_adapters", lambda _: None)


@pytest.mark.usefixtures("peft_layers")
def test_a_pass_without_a_graph_takes_what_was_planned(tiny_recipe: Callable[..., Recipe]) -> None:
    tokens = 512
    recipe = tiny_recipe(
        f"train.tokens_per_microbatch={tokens}",
        f"rollout.max_prompt_length={tokens // 2}",
        f"rollout.max_completion_length={tokens // 2}",
        "data.prompts_per_step=1",
        "rollout.num_generations=2",
    )
    policy = load_policy(recipe)
    policy.model.eval()
    ids = torch.arange(tokens) % 64 + 5
    with LiveStorages() as live, torch.no_grad():
        policy.hidden_states(ids, [[tokens]])
    planned = planned_classes(recipe, "siamese")
    assert planned["hidden states"] + planned["layer working set"] == pytest.approx(live.peak, rel=0.02)


@pytest.mark.usefixtures("cuda_like_autocast", "peft_layers")
@pytest.mark.parametrize("options", [(), ("model.dtype=bfloat16",), ("model.dtype=bfloat16", "lora.rank=512")])
@pytest.mark.parametrize(
    ("batch", "prompt_tokens", "answer_tokens", "group"),
    [(32, 32, 200, 8), (16, 32, 64, 8), (64, 200, 20, 8), (16, 200, 20, 2)],
)
def test_decoding_with_the_models_own_weights_takes_what_was_planned(
    tiny_recipe: Callable[..., Recipe],
    options: tuple[str, ...],
    batch: int,
    prompt_tokens: int,
    answer_tokens: int,
    group: int,
) -> None:
    recipe = tiny_recipe(
        *options,
        f"rollout.max_num_seqs={batch}",
        f"rollout.max_prompt_length={prompt_tokens}",
        f"rollout.max_completion_length={answer_tokens}",
        f"rollout.num_generations={group}",
        "eval.problems=0",
    )
    policy = load_policy(recipe)
    policy.stop_ids = frozenset()  # every answer has its full length
    message = ({"role": "user", "content": "?"},)
    prompts = [
        Prompt(
            problem=Problem(id=str(index), messages=message, answer=""),
            token_ids=tuple(range(5 + index, 5 + index + prompt_tokens - index % 2)),  # unequal, as prompts are
        )
        for index in range(batch // group)
    ]
    sampler = HFSampler(policy, recipe, text=lambda _: "")
    params = SamplingParams(temperature=1.0, max_completion_length=answer_tokens)
    with LiveStorages() as live:
        sampler.sample(prompts, count=group, params=params, policy_version=0, stream=("count",))
    planned = max(sum(classes.values()) for _, classes in hf_moments(recipe, load_shape(recipe.model)))
    assert planned == pytest.approx(live.peak, rel=0.02)


# ---------------------------------------------------------------------- the tiny model as a run has it


def planned_classes(recipe: Recipe, phase: str) -> dict[str, int]:
    plan = plan_memory(recipe, load_shape(recipe.model), vram_bytes=2**34)
    return next(found for found in plan.phases if found.name == phase).bytes


def test_the_tiny_model_takes_by_class_what_was_planned(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe()
    policy = load_policy(recipe)
    planned = planned_classes(recipe, "step")
    linears: list[torch.Tensor] = []
    others: dict[str, list[torch.Tensor]] = {"embeddings": [], "norms, biases": []}
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            continue
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            nested = state.state2
            linears += [parameter.data, state.absmax, state.code, state.offset, nested.absmax, nested.code]
        else:
            others["embeddings" if "embed_tokens" in name else "norms, biases"].append(parameter.data)
    assert planned["base linears"] == nbytes(linears)
    assert planned["embeddings"] == nbytes(others["embeddings"])
    assert planned["norms, biases"] == nbytes(others["norms, biases"])
    assert planned["adapters"] == nbytes(p.data for _, p in policy.adapter_parameters())
    assert planned["predictor head"] == nbytes(p.data for p in policy.predictor.parameters())
    assert planned["siamese average"] == Siamese(policy.trainable_parameters(), 0.9).extra_bytes
    trained = [parameter for _, parameter in policy.trainable_parameters()]
    optimizer = build_optimizer(policy, recipe.optimizer)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    assert planned["gradients"] == nbytes(p.grad for p in trained if p.grad is not None)
    with LiveStorages() as live:
        before = [parameter.detach().clone() for parameter in trained]
        optimizer.step()
        torch._foreach_sub_(before, [parameter.detach() for parameter in trained])
        assert live.now == pytest.approx(planned["weight copies"] + planned["optimizer state"], rel=0.02)


def kept_by_a_pass(policy: Policy, tokens: int) -> int:
    """Return the bytes that the trunk keeps for its backward pass over one sequence, without its rotations."""
    ids = torch.arange(tokens) % 64 + 5
    policy.model.train()
    base: Any = policy.model.get_base_model()
    rotary: list[int] = []
    hook = base.model.rotary_emb.register_forward_hook(
        lambda module, args, output: rotary.extend(part.untyped_storage().data_ptr() for part in output)
    )
    known = {t.untyped_storage().data_ptr() for t in (*policy.model.parameters(), *policy.model.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = policy.hidden_states(ids, [[tokens // 2]] * 2)
    hook.remove()
    skipped = known | set(rotary) | {hidden.untyped_storage().data_ptr()}
    return nbytes(tensor for key, tensor in saved.items() if key not in skipped and tensor.is_floating_point())


@pytest.mark.usefixtures("peft_layers")
def test_the_tiny_models_activations_take_what_was_planned(tiny_recipe: Callable[..., Recipe]) -> None:
    tokens = 512
    recipe = tiny_recipe(
        f"train.tokens_per_microbatch={tokens}",
        "rollout.max_prompt_length=256",
        "rollout.max_completion_length=256",
        "train.shared_prefix=false",
    )
    planned = planned_classes(recipe, "update")
    shape = load_shape(recipe.model)
    final_norm = LayerBytes(recipe, shape).input_norm * tokens
    counted = kept_by_a_pass(load_policy(recipe), tokens)
    assert planned["layer activations"] + planned["layer inputs"] + final_norm == pytest.approx(counted, rel=0.02)


@pytest.mark.usefixtures("cuda_like_autocast")
@pytest.mark.parametrize("rank", [2, 64])
def test_without_packing_each_sequence_keeps_copies_of_the_adapters(
    tiny_recipe: Callable[..., Recipe], rank: int
) -> None:
    tokens, sequences = 64, 8
    recipe = tiny_recipe(
        "model.dtype=bfloat16",
        f"lora.rank={rank}",
        "train.packing=false",
        f"train.tokens_per_microbatch={sequences * tokens}",
        f"rollout.max_prompt_length={tokens // 2}",
        f"rollout.max_completion_length={tokens // 2}",
        "data.prompts_per_step=1",
        f"rollout.num_generations={sequences}",
    )
    policy = load_policy(recipe)
    policy.model.train()
    with LiveStorages() as live:
        hidden = policy.hidden_states(torch.arange(sequences * tokens) % 64 + 5, [[tokens]] * sequences)
        alive = live.now - nbytes([hidden])
    planned, shape = planned_classes(recipe, "update"), load_shape(recipe.model)
    final_norm = LayerBytes(recipe, shape).input_norm * tokens * sequences
    rotations = 2 * 2 * shape.head_width * tokens * sequences
    assert planned["layer activations"] + final_norm + rotations == pytest.approx(alive, rel=0.001)


def test_checkpointing_keeps_the_layers_inputs(tiny_recipe: Callable[..., Recipe]) -> None:
    tokens = 512
    recipe = tiny_recipe(
        f"train.tokens_per_microbatch={tokens}",
        "rollout.max_prompt_length=256",
        "rollout.max_completion_length=256",
        "train.gradient_checkpointing=true",
    )
    planned = planned_classes(recipe, "update")
    shape: ModelShape = load_shape(recipe.model)
    policy = load_policy(recipe)
    boundaries: set[int] = set()
    base: Any = policy.model.get_base_model()
    for layer in base.model.layers:
        layer.register_forward_pre_hook(lambda module, args: boundaries.add(args[0].untyped_storage().nbytes()) or None)
    counted = kept_by_a_pass(policy, tokens)
    # Beside the inputs of the layers the final norm keeps its input, which a float32 model needs no copy of.
    final_norm = LayerBytes(recipe, shape).input_norm * tokens
    assert boundaries == {4 * shape.width * tokens}
    assert planned["layer inputs"] + final_norm == pytest.approx(counted, rel=0.02)


def test_the_base_takes_less_in_nf4_by_what_the_scales_allow(tiny_recipe: Callable[..., Recipe]) -> None:
    shape = shape_of(KNOWN_CONFIGS["Qwen/Qwen2.5-Math-7B"])
    model = tiny_recipe("model.dtype=bfloat16").model
    single = model.model_copy(update={"double_quantization": False})
    weights = parameter_counts(shape)["base linears"]
    assert base_bytes(shape, model)["base linears"] * 8 / weights == pytest.approx(4.127, abs=1e-3)
    assert base_bytes(shape, single)["base linears"] * 8 / weights == pytest.approx(4.5, abs=1e-3)
