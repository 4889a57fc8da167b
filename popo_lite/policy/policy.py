"""The policy: a frozen base, its trainable adapters, the predictor head, and how hidden states are had from them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from jinja2 import TemplateError, TemplateSyntaxError
from torch import Tensor, nn

from popo_lite.errors import ModelError
from popo_lite.fused import Head
from popo_lite.policy.adapters import add_adapters
from popo_lite.policy.attention import boundaries, enable_packing, kernel_of, positions, window_of
from popo_lite.policy.load import (
    load_base,
    load_config,
    load_tokenizer,
    load_unsloth,
    pick_device,
    quantized_modules,
)
from popo_lite.policy.siamese import PredictorHead
from popo_lite.recipe import Recipe
from popo_lite.seeding import stream_seed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True)
class Policy:
    """What is trained. `version` counts optimizer steps; a sampler must hold the same version to be used.

    `packing` is the attention that keeps the sequences of a packed row apart ("varlen", "sdpa", "flash_attention_2"),
    or "off"; `offload` keeps the inputs of checkpointed layers in host memory.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    predictor: PredictorHead
    head: Head
    device: torch.device
    stop_ids: frozenset[int]
    pad_id: int
    context_tokens: int
    quantized_modules: int
    packing: str = "off"
    offload: bool = False
    version: int = 0

    @property
    def trunk(self) -> nn.Module:
        """The decoder without its LM head, adapters included."""
        return trunk_of(self.model)

    def hidden_states(self, input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """[T] token ids of sequences one behind another, of `lengths` -> [T, D] after the final norm.

        Each sequence attends to itself alone, in one forward pass of all where `packing` says how, else in one each.
        """
        with self._checkpoints_on_host():
            if self.packing != "off" and len(lengths) > 1:
                return self._packed(input_ids, lengths)
            parts = [
                self.run_trunk(input_ids=part[None], use_cache=False).last_hidden_state[0]
                for part in input_ids.split(list(lengths))
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _packed(self, input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        options: dict[str, Any] = {"attention_mask": boundaries(lengths)}
        if self.packing == "flash_attention_2":
            edges = options["attention_mask"].flatten().to(self.device)
            options = {
                "attention_mask": None,
                "cu_seq_lens_q": edges,
                "cu_seq_lens_k": edges,
                "max_length_q": max(lengths),
                "max_length_k": max(lengths),
            }
        output = self.run_trunk(
            input_ids=input_ids[None], position_ids=positions(lengths, self.device), use_cache=False, **options
        )
        return cast("Tensor", output.last_hidden_state[0])

    def run_trunk(self, **inputs: Any) -> Any:
        """The trunk's output for transformers' `inputs`, in the policy's precision."""
        with self.precision():
            return self.trunk(**inputs)

    def precision(self) -> AbstractContextManager[None]:
        """What the trunk runs in: a 16-bit model multiplies its float32 adapters in 16 bit too, as samplers do.

        Without it PEFT would widen every layer's input to float32 and keep those copies for the backward pass.
        """
        narrow = self.head.weight.dtype == torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=narrow)

    def _checkpoints_on_host(self) -> AbstractContextManager[Any]:
        """Gradient checkpointing keeps each layer's input through these hooks, and they keep it in host memory."""
        if self.offload and torch.is_grad_enabled():
            return torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")
        return nullcontext()

    def adapter_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trainable LoRA tensors by name."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Adapters and predictor head: all that is trained, averaged and checkpointed."""
        return self.adapter_parameters() + [(f"predictor.{name}", p) for name, p in self.predictor.named_parameters()]


def load_policy(recipe: Recipe) -> Policy:
    """Base, adapters and head as the recipe says. Raises ModelError where the model does not fit the recipe."""
    device = pick_device(recipe.train.device)
    # Before gigabytes are read, and before unsloth would stretch the context with another rotary scaling.
    _refuse_beyond_context(recipe, _context_tokens(load_config(recipe.model)))
    if recipe.model.backend == "unsloth":
        model, tokenizer = load_unsloth(
            recipe.model,
            recipe.lora,
            sequence_tokens=recipe.rollout.max_prompt_length + recipe.rollout.max_completion_length,
            seed=stream_seed("adapters", recipe.train.seed) % 2**31,
            gradient_checkpointing=recipe.train.gradient_checkpointing,
        )
        peft_model = cast("PeftModel", model)
    else:
        tokenizer = load_tokenizer(recipe.model)
        base = load_base(recipe.model, device)
        peft_model = add_adapters(base, recipe.lora, recipe.train.seed)
        if recipe.train.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
    return wrap_policy(peft_model, tokenizer, recipe, device)


def wrap_policy(model: PeftModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, device: torch.device) -> Policy:
    """A policy around a PEFT model that is loaded already; checks that its LM head is one we compute exactly."""
    base: Any = model.get_base_model()
    for _, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    head = head_of(base, temperature=recipe.rollout.temperature)
    torch.manual_seed(stream_seed("predictor", recipe.train.seed))
    predictor = PredictorHead(
        head.weight.shape[1],
        recipe.siamese.head_width,
        dtype=torch.promote_types(head.weight.dtype, torch.float32),
    ).to(device)
    policy = Policy(
        model=model,
        tokenizer=tokenizer,
        predictor=predictor,
        head=head,
        device=device,
        stop_ids=stop_ids_of(base, tokenizer, recipe.data.chat_template),
        pad_id=cast("int", tokenizer.pad_token_id),
        context_tokens=_context_tokens(base.config),
        quantized_modules=quantized_modules(model),
        offload=recipe.train.offload_activations,
    )
    _refuse_unknown_head(policy)
    if recipe.train.packing and recipe.model.backend == "transformers" and recipe.model.attn_implementation != "eager":
        _pack(policy, recipe)
    return policy


def trunk_of(model: PeftModel) -> nn.Module:
    """The decoder inside a PEFT causal language model."""
    base: Any = model.get_base_model()
    return cast("nn.Module", getattr(base, base.base_model_prefix))


def head_of(base: Any, *, temperature: float) -> Head:
    """The LM head of a transformers causal model, with the scaling and capping its config names."""
    output = base.get_output_embeddings()
    if not isinstance(output, nn.Linear) or type(output) is not nn.Linear:
        raise ModelError(
            f"its LM head is a {type(output).__name__}, and the chunked loss needs a plain 16/32-bit linear layer",
            where="model.id",
            next_step="keep the LM head out of quantisation and out of lora.target_modules",
        )
    config = base.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    return Head(
        weight=output.weight,
        bias=output.bias,
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),  # Gemma
        temperature=temperature,
    )


@torch.no_grad()
def _refuse_unknown_head(policy: Policy) -> None:
    """Compare our logits with the model's own, so that an architecture with another rule is found before step 0."""
    ids = torch.arange(1, 9, device=policy.device)
    policy.model.eval()
    with policy.precision():
        expected = policy.model(input_ids=ids[None]).logits[0]
    found = policy.head.logits(policy.hidden_states(ids, [len(ids)]))
    found = found * policy.head.temperature
    # The model may round its logits to the head's precision, ours are not rounded; half an eps is the most that does.
    eps = max(torch.finfo(dtype).eps for dtype in (expected.dtype, policy.head.weight.dtype))
    tolerance = 2 * eps * float(expected.abs().max().clamp(min=1.0))
    gap = float((found - expected).abs().max())
    if gap > max(tolerance, 1e-4):
        raise ModelError(
            f"{type(policy.model.get_base_model()).__name__} changes its logits in a way that is not known here "
            f"(largest difference {gap:.3g})",
            where="model.id",
            next_step="please report the model; logit scaling and soft-capping are what is supported",
        )


@torch.no_grad()
def _pack(policy: Policy, recipe: Recipe) -> None:
    """Turn packing on where no window cuts a sequence, and hold a packed row against its sequences alone.

    A model may read its mask in its own way, so a packed row must be far nearer to them than a row is whose sequences
    see one another.
    """
    base: Any = policy.model.get_base_model()
    window = window_of(base.config)
    if window is not None and window < recipe.rollout.max_prompt_length + recipe.rollout.max_completion_length:
        return
    lengths = (5, 17, 9)
    ids = torch.arange(1, sum(lengths) + 1, device=policy.device)
    policy.model.eval()
    alone = policy.hidden_states(ids, lengths)
    if not bool(alone.isfinite().all()):  # of weights that are not finite nothing can be said
        return
    leaking = policy.run_trunk(
        input_ids=ids[None], position_ids=positions(lengths, policy.device), attention_mask=_one_block(ids)
    ).last_hidden_state[0]
    if recipe.model.attn_implementation == "flash_attention_2":
        policy.packing = "flash_attention_2"
    else:
        enable_packing(base)
        width = getattr(base.config, "head_dim", None) or base.config.hidden_size // base.config.num_attention_heads
        policy.packing = kernel_of(policy.device, alone.dtype, width)
    # Channel by channel: a few have values so large that their rounding would hide all else.
    scale = alone.float().abs().amax(dim=0).clamp(min=1e-6)

    def distance(states: Tensor) -> float:
        return float(((states - alone).float() / scale)[lengths[0] :].square().mean().sqrt())

    try:
        gap = distance(policy.hidden_states(ids, lengths))
        reason = f"the distance is {gap:.2g}, and {distance(leaking):.2g} where they see one another"
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        gap, reason = float("inf"), str(error).strip().partition("\n")[0]
    # Rounding differs by kernel and adds up over layers.
    if not gap <= min(256 * torch.finfo(alone.dtype).eps, distance(leaking) / 8):
        raise ModelError(
            f"{type(base).__name__} does not keep the sequences of a packed row apart: {reason}",
            where="train.packing = true",
            next_step="--set train.packing=false runs one sequence at a time",
        )


def _one_block(ids: Tensor) -> Tensor:
    """The mask of a row that is a single sequence, whatever its positions say: [1, T] ones."""
    return torch.ones_like(ids)[None]


def stop_ids_of(base: Any, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> frozenset[int]:
    """Every id that ends an answer: all EOS ids of model and tokenizer, and the token that ends a turn in the chat.

    A base model's EOS is often not its template's end of turn. Answers would run on into a next turn, unseen as
    special tokens are not shown, and positives would be trained on it. Raises ModelError where nothing ends an answer.
    """
    found: set[int] = set()
    for owner in (base.generation_config, base.config, tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    if chat_template or tokenizer.chat_template:
        after = tokenizer.encode(_after_an_answer(tokenizer, chat_template), add_special_tokens=False)
        if after and after[0] in tokenizer.all_special_ids:
            found.add(after[0])
    if not found:
        raise ModelError(
            "neither model, tokenizer nor chat template names a token that ends an answer",
            where="model.id",
            next_step="give the model an eos_token_id in generation_config.json",
        )
    return frozenset(found)


def _after_an_answer(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str:
    """What the template writes behind an assistant's message; nothing where it takes none or leaves it out."""
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": "answer"}],
            chat_template=chat_template,
            tokenize=False,
        )
    except TemplateSyntaxError as error:
        raise ModelError(
            f"the chat template is no valid Jinja: {error}",
            where="data.chat_template" if chat_template else f"the tokenizer of {tokenizer.name_or_path}",
            next_step="correct it, or set data.chat_template (popo-lite eval: --chat-template FILE)",
        ) from error
    except TemplateError:  # it refuses assistant turns, and so names no end of one
        return ""
    _, answered, after = str(text).rpartition("answer")
    return after if answered else ""


def _context_tokens(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def _refuse_beyond_context(recipe: Recipe, context: int) -> None:
    wanted = recipe.rollout.max_prompt_length + recipe.rollout.max_completion_length
    if wanted > context:
        raise ModelError(
            f"prompt and answer may take {recipe.rollout.max_prompt_length} + {recipe.rollout.max_completion_length} "
            f"= {wanted} tokens, and the context of {recipe.model.id} is {context}",
            where="rollout.max_prompt_length, rollout.max_completion_length",
            next_step=f"--set rollout.max_completion_length={max(1, context - recipe.rollout.max_prompt_length)}"
            if recipe.rollout.max_prompt_length < context
            else f"lower rollout.max_prompt_length below {context}",
        )
