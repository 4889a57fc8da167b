"""Model families, each small: a config with two narrow layers, and its folder as the Hub would have it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PhiConfig,
    PhiForCausalLM,
)

from popo_lite.policy.load import TINY_FOLDER

WINDOW = 24  # shorter than the sequences, so that a window that gets lost is seen
DROPOUT = 0.1
"""Of the bases that have some."""
SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "eos_token_id": 1, "pad_token_id": 0,
    "bos_token_id": None,
}  # fmt: skip
"""Widths are multiples of 64, the block of NF4; the vocabulary is that of the tiny model's tokenizer."""
MIXED = ["sliding_attention", "full_attention"]
HYBRID = ["linear_attention", "full_attention"]
DELTA_NET = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": HYBRID,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LONGROPE = {
    "max_position_embeddings": 2048,
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8, "long_factor": [1.0 + 4 * i for i in range(8)],
    },
}  # fmt: skip
QWEN_VISION = {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@dataclass(frozen=True)
class Family:
    """A model type of transformers, what its config says besides SIZES, and models of it that people train."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    wrapper: dict[str, Any] | None = None
    """The Hub's form with other parts beside the text model: `config` is its `text_config`."""
    like: str = ""
    own_class: bool = False
    """transformers has no causal LM of it, only a model that also sees images."""
    refused: str = ""
    """The sentence that refuses it with the defaults."""
    overrides: tuple[str, ...] = ()
    """The setting that the refusal tells a user to change."""


# fmt: off
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", like="Llama 3.2"),
    "mistral": Family("mistral", {"sliding_window": WINDOW}, like="Mistral 7B v0.1, with a window"),
    "ministral3": Family("ministral3", like="Ministral 3, text"),
    "ministral3_hub": Family(
        "mistral3",
        {"model_type": "ministral3"},
        {"vision_config": {"model_type": "pixtral", **VISION, "head_dim": 16, "image_size": 32, "patch_size": 16}},
        like="Ministral 3, Mistral Small 3",
        own_class=True,
    ),
    "qwen2": Family("qwen2", like="Qwen2.5, R1 distillates"),
    "qwen2_vl": Family(
        "qwen2_5_vl",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        {"vision_config": QWEN_VISION},
        like="Qwen2.5-VL",
        own_class=True,
    ),
    "qwen2_moe": Family("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 64}, like="Qwen1.5-MoE"),
    "qwen3": Family("qwen3", {"head_dim": 32}, like="Qwen3"),
    "qwen3_moe": Family("qwen3_moe", EXPERTS | {"head_dim": 32}, like="Qwen3-30B-A3B"),
    "qwen3_next": Family(
        "qwen3_next", EXPERTS | DELTA_NET | {"head_dim": 32, "shared_expert_intermediate_size": 64}, like="Qwen3-Next"
    ),
    "qwen3_5": Family("qwen3_5_text", DELTA_NET | {"head_dim": 32}, like="Qwen3.5, text"),
    "qwen3_5_hub": Family(
        "qwen3_5",
        DELTA_NET | {"head_dim": 32},
        {"vision_config": QWEN_VISION},
        like="Qwen3.5",
    ),
    "gemma2": Family(
        "gemma2",
        {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 1, "attn_logit_softcapping": 1.0},
        like="Gemma 2",
    ),
    "gemma3": Family(
        "gemma3_text", {"head_dim": 16, "sliding_window": WINDOW, "layer_types": MIXED}, like="Gemma 3 1B"
    ),
    "gemma3_hub": Family(
        "gemma3",
        {"head_dim": 16, "sliding_window": WINDOW, "layer_types": MIXED},
        {"vision_config": {**VISION, "image_size": 32, "patch_size": 16}, "mm_tokens_per_image": 4},
        like="Gemma 3 4B and larger",
    ),
    "gemma4": Family(
        "gemma4_text",
        {
            "head_dim": 16, "global_head_dim": 32, "sliding_window": WINDOW, "layer_types": MIXED,
            "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 320,
        },
        like="Gemma 4, text",
    ),
    "gemma4_hub": Family(
        "gemma4",
        {
            "head_dim": 16, "global_head_dim": 32, "sliding_window": WINDOW, "layer_types": MIXED,
            "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 320,
        },
        {"vision_config": {**VISION, "head_dim": 16, "num_key_value_heads": 2}, "audio_config": None},
        like="Gemma 4",
    ),
    "gemma4_moe": Family(
        "gemma4_text",
        {
            "head_dim": 16, "global_head_dim": 32, "sliding_window": WINDOW, "layer_types": MIXED,
            "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
            "moe_intermediate_size": 64,
        },
        like="Gemma 4 26B-A4B, text",
    ),
    "phi": Family("phi", {"attention_dropout": DROPOUT, "resid_pdrop": DROPOUT, "embd_pdrop": DROPOUT}, like="Phi-2"),
    "phi3": Family("phi3", like="Phi-3, Phi-4"),
    "phi3_longrope": Family("phi3", LONGROPE, like="Phi-4-mini, Phi-3 128k"),
    "phimoe": Family("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}, like="Phi-3.5-MoE"),
    "smollm3": Family("smollm3", {"no_rope_layers": [1, 0]}, like="SmolLM3"),
    "olmo2": Family("olmo2", like="OLMo 2"),
    "olmo3": Family("olmo3", {"sliding_window": WINDOW, "layer_types": MIXED}, like="OLMo 3"),
    "olmoe": Family("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}, like="OLMoE"),
    "granite": Family("granite", {"attention_multiplier": 0.2, "logits_scaling": 4.0}, like="Granite 3"),
    "granite4h": Family(
        "granitemoehybrid",
        MAMBA | {"layer_types": HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64,
                 "shared_intermediate_size": 64, "mamba_expand": 2, "logits_scaling": 4.0},
        like="Granite-4-H",
    ),
    "glm4": Family("glm4", {"head_dim": 16}, like="GLM-4"),
    "glm4_moe": Family(
        "glm4_moe",
        {"head_dim": 16, "moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
         "topk_group": 1, "first_k_dense_replace": 1},
        like="GLM-4.5-Air",
    ),
    "exaone4": Family("exaone4", {"sliding_window": WINDOW, "layer_types": MIXED}, like="EXAONE 4"),
    "lfm2": Family(
        "lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}, like="LFM2"
    ),
    "lfm2_moe": Family(
        "lfm2_moe",
        EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        like="LFM2-8B-A1B",
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        {"moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
         "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16,
         "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4, "num_mtp_layers": 0},
        like="DeepSeek-V3, Moonlight",
    ),
    "gpt_oss": Family(
        "gpt_oss",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW,
         "layer_types": MIXED, "intermediate_size": 64},
        like="gpt-oss, in 16 bit",
    ),
    "falcon_h1": Family(
        "falcon_h1",
        MAMBA | {"mamba_d_ssm": 128, "head_dim": 16, "lm_head_multiplier": 0.5, "ssm_multipliers": [0.9] * 5,
                 "mlp_multipliers": [0.9, 0.8]},
        like="Falcon-H1",
    ),
    "cohere2": Family(
        "cohere2", {"sliding_window": WINDOW, "layer_types": MIXED, "logit_scale": 0.25}, like="Command R7B"
    ),
    "starcoder2": Family(
        "starcoder2",
        {"sliding_window": None, "residual_dropout": DROPOUT, "embedding_dropout": DROPOUT,
         "attention_dropout": DROPOUT},
        like="StarCoder2",
    ),
    "mixtral": Family("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, like="Mixtral"),
    "seed_oss": Family(
        "seed_oss", {"head_dim": 16, "attention_dropout": DROPOUT, "residual_dropout": DROPOUT}, like="Seed-OSS"
    ),
    "gpt2": Family("gpt2", {"resid_pdrop": DROPOUT, "embd_pdrop": DROPOUT, "attn_pdrop": DROPOUT}, like="GPT-2"),
    "falcon": Family(
        "falcon",
        {"num_kv_heads": 4, "new_decoder_architecture": False},
        like="Falcon 7B",
        refused="bitsandbytes quantises none of the layers of a falcon model",
        overrides=('model.quantization="none"',),
    ),
    "mamba2": Family(
        "mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16}, like="Mamba 2",
        refused="Mamba2ForCausalLM has no cache of the usual kind to sample with",
    ),
}
# fmt: on


def config_of(family: Family) -> Any:
    """Return transformers' config of the small model."""
    text = SIZES | family.config
    if family.wrapper is None:
        return AutoConfig.for_model(family.model_type, **text)
    return AutoConfig.for_model(
        family.model_type, text_config=text, eos_token_id=1, pad_token_id=0, bos_token_id=None, **family.wrapper
    )


def write_family(family: Family, folder: Path) -> None:
    """Write a folder with random float32 weights and the tiny model's tokenizer."""
    torch.manual_seed(0)
    kind = AutoModelForImageTextToText if family.wrapper else AutoModelForCausalLM
    model = kind.from_config(config_of(family), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)  # sharper attention shows what gets lost
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_FOLDER).save_pretrained(folder)


def save_phi(folder: Path) -> Path:
    """Save a Phi, which keeps float64 from end to end: the norms of Llama and Qwen pass through float32."""
    torch.manual_seed(0)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            eos_token_id=1,
            pad_token_id=0,
            bos_token_id=None,
        )
    )
    for parameter in model.parameters():
        parameter.data *= 4  # distributions far from uniform
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_FOLDER).save_pretrained(folder)
    return folder
