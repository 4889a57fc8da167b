"""The policy: a frozen base, its trainable adapters, the predictor head, and the hidden states of sequences."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from popo_lite.distributed import Ranks
from popo_lite.errors import ModelError
from popo_lite.fused import Head
from popo_lite.policy.activations import checkpoint_layers, offloaded
from popo_lite.policy.adapters import adapter_folder, add_adapters, check_targets, load_adapter_weights
from popo_lite.policy.attention import Row, enable_packing, kernel_of, layout, positions
from popo_lite.policy.device import check_dtype, pick_device
from popo_lite.policy.load import (
    can_be_built,
    check_architecture,
    empty_base,
    load_base,
    load_config,
    load_tokenizer,
    load_unsloth,
    quantized_weights,
    turn_off_dropout,
)
from popo_lite.policy.memory import is_out_of_memory
from popo_lite.policy.merged import merge_adapters
from popo_lite.policy.parts import context_of, decoder_of, hold_in_eval_mode
from popo_lite.policy.sharding import gathered, shard, start_passes
from popo_lite.policy.siamese import PredictorHead
from popo_lite.policy.tokens import stop_ids_of
from popo_lite.recipe import Recipe
from popo_lite.recipe_rules import check_context
from popo_lite.seeding import stream_seed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(kw_only=True)
class Policy:
    """The model that is trained. `version` counts optimizer steps; a sampler must have the same version to be used.

    `packing` is the attention that keeps the sequences of a packed row apart ("varlen", "sdpa", "flash_attention_2"),
    or "off"; `shared_prefix` whether the answers to a prompt can share its tokens. `offload` keeps the inputs of
    checkpointed layers in host memory. `quantized_share` is the part of the base's weights that is in 4 bit. `notices`
    say which settings differ from the recipe's, because the model needs others. The base is divided over the ranks
    `sharded_over`, which must run every pass together; over one rank it is whole.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    predictor: PredictorHead
    head: Head
    device: torch.device
    stop_ids: frozenset[int]
    quantized_modules: int
    quantized_share: float = 0.0
    notices: list[str] = field(default_factory=list)
    packing: str = "off"
    shared_prefix: bool = False
    offload: bool = False
    version: int = 0
    sharded_over: Ranks = field(default_factory=Ranks)

    @property
    def trunk(self) -> nn.Module:
        """The decoder without its LM head, with the adapters."""
        return decoder_of(cast("PreTrainedModel", self.model.get_base_model()))

    def hidden_states(self, input_ids: Tensor, row: Row) -> Tensor:
        """Return the states [T, D] after the final norm of the sequences in `input_ids` [T], whose lengths `row` gives.

        Each sequence attends only to itself and its prompt: in one packed forward pass if `packing` is on, else in one
        pass each. Raises ValueError if answers share a prompt and `shared_prefix` is off.
        """
        lengths = [sum(block) for block in row]
        if not self.shared_prefix and any(len(block) > 2 for block in row):
            raise ValueError("answers share a prompt, and the policy's attention cannot keep them apart")
        if self.packing == "off" and len(row) > 1:
            return torch.cat([self.hidden_states(part, [[len(part)]]) for part in input_ids.split(lengths)])
        options: dict[str, Any] = {}
        if self.packing != "off":
            options["position_ids"] = positions(row, self.device)
        if self.packing in ("sdpa", "varlen"):
            # For a single sequence too: transformers' SDPA would take a kernel with T x T scores in float32 on a GPU.
            options["attention_mask"] = layout(row)
        elif options:
            edges = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=self.device)
            options |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), edges)
            options |= dict.fromkeys(("max_length_q", "max_length_k"), max(lengths))
        saving: AbstractContextManager[Any] = nullcontext()
        if self.offload and torch.is_grad_enabled():
            saving = offloaded(self.device, input_ids.numel() * self.head.weight.shape[1])
        with saving:
            output = self.run_trunk(input_ids=input_ids[None], use_cache=False, **options)
        return cast("Tensor", output.last_hidden_state[0])

    def run_trunk(self, **inputs: Any) -> Any:
        """Return the trunk's output for transformers' `inputs`, in the policy's precision."""
        with self.precision():
            return self.trunk(**inputs)

    def precision(self) -> AbstractContextManager[None]:
        """Return the autocast in which a 16-bit model multiplies its float32 adapters in 16 bit too, as samplers do.

        Without it PEFT would convert every layer's input to float32 and keep those copies for the backward pass.
        """
        dtype = self.head.weight.dtype
        narrow = dtype.itemsize == 2
        return torch.autocast(self.device.type, dtype=dtype if narrow else torch.bfloat16, enabled=narrow)

    def start_passes(self) -> None:
        """Prepare a sharded base for passes that all ranks run together."""
        if self.sharded_over.size > 1:
            start_passes(self.trunk)

    def idle_pass(self) -> None:
        """Take part in a pass of other ranks that share a sharded base, and in its backward pass unless in no-grad."""
        hidden = self.hidden_states(torch.arange(1, 9, device=self.device), [(8,)])
        if hidden.requires_grad:
            hidden.backward(torch.zeros_like(hidden))

    def gathered(self) -> AbstractContextManager[None]:
        """Keep a sharded base whole for the block, in which ranks may run different passes without gradients."""
        return gathered(self.trunk, self.sharded_over) if self.sharded_over.size > 1 else nullcontext()

    def adapter_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the trainable LoRA tensors by name."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return all that is trained, averaged and checkpointed: adapters and predictor head."""
        return self.adapter_parameters() + [(f"predictor.{name}", p) for name, p in self.predictor.named_parameters()]


def load_policy(recipe: Recipe, ranks: Ranks | None = None) -> Policy:
    """Load base, adapters and head as the recipe says; with `distributed.strategy = "fsdp2"` sharded over `ranks`.

    Raises ModelError if the model does not fit the recipe.
    """
    device = pick_device(recipe.train.device)
    sharded_over = ranks if ranks is not None and recipe.distributed.strategy == "fsdp2" else Ranks()
    sharded = sharded_over.size > 1
    check_dtype(recipe.model, device)
    # Before gigabytes are read, and before unsloth would stretch the context with another rotary scaling.
    config = load_config(recipe.model)
    check_context(recipe, context_of(config))
    if recipe.model.backend == "unsloth":
        return wrap_policy(*load_unsloth(recipe), recipe, device)
    notices = []
    if can_be_built(recipe.model, config):
        empty = empty_base(recipe.model, config)
        check_architecture(empty, recipe.model)
        notices = check_targets(empty, recipe.lora)
    tokenizer = load_tokenizer(recipe.model)
    base = load_base(recipe.model, device, on_host=sharded)  # the GPU may not hold all of it
    model = add_adapters(base, recipe.lora, recipe.train.seed)
    modules = shard(base, device) if sharded else None
    if recipe.train.gradient_checkpointing:
        checkpoint_layers(base, modules)
    deque(modules or (), maxlen=0)  # what is left to divide
    with sharded_over.together():
        policy = wrap_policy(model, tokenizer, recipe, device)
    policy.sharded_over = sharded_over
    policy.notices[:0] = notices
    return policy


def load_trained_policy(recipe: Recipe, adapter: Path) -> Policy:
    """Return the recipe's base with the PEFT adapter in `adapter`, in eval mode. The predictor head is untrained."""
    folder = adapter_folder(adapter, key="run folder")
    # In place of the adapter that training may have started from, which need not exist any more.
    policy = load_policy(recipe.with_values({"lora.init_from": str(folder)}))
    if recipe.model.backend == "unsloth":  # which makes new adapters whatever lora.init_from says
        load_adapter_weights(policy.model, folder)
    policy.model.eval()
    return policy


def wrap_policy(model: PeftModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, device: torch.device) -> Policy:
    """Build a policy from a loaded PEFT model. Raises ModelError if its logits would be wrong."""
    base: Any = model.get_base_model()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    turn_off_dropout(model)
    if device.type == "cpu":
        merge_adapters(model)
    hold_in_eval_mode(base)
    head = head_of(base, temperature=recipe.rollout.temperature)
    modules, share = quantized_weights(base)
    torch.manual_seed(stream_seed("predictor", recipe.train.seed))
    policy = Policy(
        model=model,
        tokenizer=tokenizer,
        predictor=PredictorHead(head.weight.shape[1], recipe.siamese.head_width, dtype=head.compute_dtype).to(device),
        head=head,
        device=device,
        stop_ids=stop_ids_of(base, tokenizer, recipe.data.chat_template),
        quantized_modules=modules,
        quantized_share=share,
        offload=recipe.train.offload_activations,
    )
    check_logits(policy)
    if recipe.model.backend == "transformers":
        policy.notices += fix_longrope(base, recipe.rollout.sequence_tokens)
        policy.notices += _choose_attention(policy, recipe)
        if recipe.train.packing and base.config._attn_implementation != "eager":
            policy.notices += _pack(policy, recipe)
    return policy


def head_of(base: Any, *, temperature: float) -> Head:
    """Return the LM head of a transformers causal model, with the logit scaling and soft-capping of its config."""
    output = base.get_output_embeddings()
    if type(output) is not nn.Linear:
        what = f"its LM head is a {type(output).__name__}, and the loss needs a plain 16/32-bit linear layer"
        next_step = "keep the LM head out of quantisation and out of lora.target_modules"
        raise ModelError(what, where="model.id", next_step=next_step)
    config = base.config.get_text_config()
    cohere, granite, falcon_h1 = (
        float(getattr(config, name, None) or 1.0) for name in ("logit_scale", "logits_scaling", "lm_head_multiplier")
    )
    scale, softcap = cohere / granite * falcon_h1, getattr(config, "final_logit_softcapping", None)  # Gemma's
    return Head(weight=output.weight, bias=output.bias, scale=scale, softcap=softcap, temperature=temperature)


@torch.no_grad()
def check_logits(policy: Policy) -> None:
    """Raise ModelError if our logits differ from the model's own: its architecture changes them in an unknown way."""
    ids = torch.arange(1, 9, device=policy.device)
    policy.model.eval()
    with policy.precision():
        expected = policy.model(input_ids=ids[None]).logits[0]
    ours = policy.head.logits(policy.hidden_states(ids, [[len(ids)]])) * policy.head.temperature
    # The model may round its logits to the head's precision, which changes them by at most half an eps. Ours are exact.
    if policy.head.weight.dtype == torch.float16 and not bool(expected.isfinite().all()):
        what = f"activations of {type(policy.model.get_base_model()).__name__} exceed what float16 can hold, 65,504"
        next_step = (
            "use bfloat16 on a GPU of compute capability 8.0, or --set model.dtype=float32 --set rollout.engine=hf"
        )
        raise ModelError(what, where='model.dtype = "float16"', next_step=next_step)
    eps = max(torch.finfo(dtype).eps for dtype in (expected.dtype, policy.head.weight.dtype))
    tolerance = 2 * eps * float(expected.abs().max().clamp(min=1.0))
    gap = float((ours - expected).abs().max())
    if gap > max(tolerance, 1e-4):
        name = type(policy.model.get_base_model()).__name__
        what = f"{name} changes its logits in a way that is not known here (largest difference {gap:.3g})"
        next_step = "please report the model; supported are logit scaling and soft-capping"
        raise ModelError(what, where="model.id", next_step=next_step)


@torch.no_grad()
def fix_longrope(base: Any, sequence_tokens: int) -> list[str]:
    """Let rotary embeddings of the type longrope use one set of factors for all sequences; return notices.

    transformers takes the long factors for all of a batch if its longest sequence exceeds the original context: then a
    token's state would depend on its neighbours in a row, and a cached key on when it was computed. vLLM takes the long
    factors for a run that allows such sequences.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rotary = [module for module in base.modules() if getattr(module, "rope_type", None) == "longrope"]
    config = base.config.get_text_config()
    original = config.rope_parameters["original_max_position_embeddings"] if rotary else 0
    if not rotary or sequence_tokens <= original:
        return []
    for module in rotary:
        device = module.inv_freq.device
        factors, _ = ROPE_INIT_FUNCTIONS["longrope"](config, device, seq_len=original + 1)
        module.inv_freq = module.original_inv_freq = factors
    return [f"prompt and answer may exceed {original} tokens: longrope's long factors are used for all, as in vLLM"]


@torch.no_grad()
def _choose_attention(policy: Policy, recipe: Recipe) -> list[str]:
    """Change from SDPA to eager attention if the model computes something else with SDPA; return notices.

    They are compared on one sequence that is longer than the model's window, if it has one that matters.
    """
    base: Any = policy.model.get_base_model()
    wanted = recipe.model.attn_implementation
    if (loaded := base.config._attn_implementation) != wanted:
        why = f", because {wanted} leaves out what this model's attention needs" if loaded == "eager" else ""
        return [f"attention is {loaded}, not {wanted}{why}"]
    if wanted != "sdpa" or not base._can_set_attn_implementation():
        return []
    windows = [window + 8 for window in _windows(base.config) if window < recipe.rollout.sequence_tokens]
    tokens = max(windows, default=40)
    ids = torch.arange(1, tokens + 1, device=policy.device) % min(1000, policy.head.weight.shape[0])
    policy.model.eval()
    found = policy.hidden_states(ids, [(tokens,)])
    if not bool(found.isfinite().all()):
        return []
    try:
        base.set_attn_implementation("eager")
        expected = policy.hidden_states(ids, [(tokens,)])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        expected = found  # eager attention would not fit either
    # Eager attention takes its softmax in float32, whatever the dtype.
    if _distance(found, expected) <= max(_rounding(found.dtype), _rounding(torch.float32)):
        base.set_attn_implementation("sdpa")
        return []
    return [f"attention is eager: with {wanted} {type(base).__name__} computes something else"]


def _windows(config: Any) -> list[int]:
    """Return how many tokens the model's windows span."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds and not any("sliding" in kind or "chunk" in kind for kind in kinds):
        return []
    names = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")
    return [int(window) for name in names if (window := getattr(text, name, None))]


def _distance(states: Tensor, expected: Tensor) -> float:
    """Return the root mean square difference of two [T, D] in multiples of each channel's largest value.

    Channel by channel: the rounding of a channel with large values would hide differences in the others.
    """
    scale = expected.float().abs().amax(dim=0).clamp(min=1e-6)
    return float(((states - expected).float() / scale).square().mean().sqrt())


def _rounding(dtype: torch.dtype) -> float:
    """Return the largest distance that rounding explains.

    It differs by kernel and adds up over layers: to 310 eps in the 30 of SmolLM2-135M.
    """
    return min(2048 * torch.finfo(dtype).eps, 1 / 8)


@torch.no_grad()
def _pack(policy: Policy, recipe: Recipe) -> list[str]:
    """Turn packing on, unless the sequences of a row would see each other; return notices.

    Some models apply their window only by the mask, so a layout in place of the mask would turn it off.
    A model may read its mask in its own way, or pass a state from token to token. So a packed row must be much closer
    to its sequences run one at a time than a row whose sequences see each other is; then the same with a prompt that
    two answers share.
    """
    base: Any = policy.model.get_base_model()
    if any(window < recipe.rollout.sequence_tokens for window in _windows(base.config)):
        return ["sequences run one at a time, because the model's window is shorter than they may be"]
    # A prompt of 8 tokens with answers of 9 and 4, between two sequences: once in a row of their own, once shared.
    row = [(5,), (8, 9), (8, 4), (6,)]
    ids = torch.arange(1, 41, device=policy.device)
    ids[22:30] = ids[5:13]
    shared_row, once = [(5,), (8, 9, 4), (6,)], torch.tensor([*range(22), *range(30, 40)], device=policy.device)
    policy.model.eval()
    alone = policy.hidden_states(ids, row)
    if not bool(alone.isfinite().all()):  # nothing can be compared if the weights are not finite
        return []
    leaking = {"position_ids": positions(row, policy.device), "attention_mask": torch.ones_like(ids)[None]}
    leak = _distance(policy.run_trunk(input_ids=ids[None], **leaking).last_hidden_state[0][5:], alone[5:])
    limit = min(_rounding(alone.dtype), leak / 8)

    def apart(states: Callable[[], Tensor], expected: Tensor = alone) -> bool:
        try:
            return _distance(states()[5:], expected[5:]) <= limit
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            return False

    policy.packing = recipe.model.attn_implementation
    if policy.packing == "sdpa":
        enable_packing(base)
        config = base.config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        policy.packing = kernel_of(policy.device, alone.dtype, width)
    if not apart(lambda: policy.hidden_states(ids, row)):
        policy.packing = "off"
        base.set_attn_implementation(recipe.model.attn_implementation)
        return [f"sequences run one at a time, because {type(base).__name__} cannot keep those of a packed row apart"]
    policy.shared_prefix = recipe.train.shared_prefix and policy.packing != "flash_attention_2"
    if policy.shared_prefix and not apart(partial(policy.hidden_states, ids[once], shared_row), alone[once]):
        policy.shared_prefix = False
        return [f"prompts are computed for each answer: {type(base).__name__} cannot keep answers to one prompt apart"]
    return []
