"""The policy: a frozen base, its trainable adapters, the predictor head, and how hidden states are had from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from popo_lite.errors import ModelError
from popo_lite.objective.logprobs import Head
from popo_lite.policy.adapters import add_adapters
from popo_lite.policy.load import (
    load_base,
    load_config,
    load_tokenizer,
    load_unsloth,
    pick_device,
    quantized_modules,
)
from popo_lite.policy.predictor import PredictorHead
from popo_lite.recipe import Recipe
from popo_lite.seeding import stream_seed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True)
class Policy:
    """What is trained. `version` counts optimizer steps; a sampler must hold the same version to be used."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    predictor: PredictorHead
    head: Head
    device: torch.device
    stop_ids: frozenset[int]
    pad_id: int
    context_tokens: int
    quantized_modules: int
    version: int = 0

    @property
    def trunk(self) -> nn.Module:
        """The decoder without its LM head, adapters included."""
        return trunk_of(self.model)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, T] token ids and mask (1 = real) -> [B, T, D] after the final norm."""
        output = self.trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return cast("Tensor", output.last_hidden_state)

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
            sequence_tokens=recipe.rollout.max_prompt_tokens + recipe.rollout.max_completion_tokens,
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
    )
    _refuse_unknown_head(policy)
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
            next_step="keep the LM head out of quantisation and out of lora.targets",
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
    ids = torch.arange(1, 9, device=policy.device)[None]
    mask = torch.ones_like(ids)
    policy.model.eval()
    expected = policy.model(input_ids=ids, attention_mask=mask).logits[0]
    found, _ = policy.head.logits(policy.hidden_states(ids, mask)[0])
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
    template = chat_template or tokenizer.chat_template
    if template:
        text = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "?"}, {"role": "assistant", "content": "answer"}],
                chat_template=template,
                tokenize=False,
            )
        )
        after = tokenizer.encode(text.rpartition("answer")[2], add_special_tokens=False)
        if after and after[0] in tokenizer.all_special_ids:
            found.add(after[0])
    if not found:
        raise ModelError(
            "neither model, tokenizer nor chat template names a token that ends an answer",
            where="model.id",
            next_step="give the model an eos_token_id in generation_config.json",
        )
    return frozenset(found)


def _context_tokens(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def _refuse_beyond_context(recipe: Recipe, context: int) -> None:
    wanted = recipe.rollout.max_prompt_tokens + recipe.rollout.max_completion_tokens
    if wanted > context:
        raise ModelError(
            f"prompt and answer may take {recipe.rollout.max_prompt_tokens} + {recipe.rollout.max_completion_tokens} "
            f"= {wanted} tokens, and the context of {recipe.model.id} is {context}",
            where="rollout.max_prompt_tokens, rollout.max_completion_tokens",
            next_step=f"--set rollout.max_completion_tokens={max(1, context - recipe.rollout.max_prompt_tokens)}"
            if recipe.rollout.max_prompt_tokens < context
            else f"lower rollout.max_prompt_tokens below {context}",
        )
