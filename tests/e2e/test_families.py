"""Test the architectures and chat formats of the GPU recipes, built small: one real step each, NF4 on the CPU.

Configs are the originals' with fewer and narrower layers; tokenizers are the tiny model's with each family's special
tokens and a template of its format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from helpers import json_lines
from popo_lite.callbacks import Callback
from popo_lite.errors import ModelError
from popo_lite.policy.load import load_tokenizer
from popo_lite.policy.tokens import stop_ids_of
from popo_lite.recipe import ModelRecipe, Recipe
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder
from popo_lite.samplers import SamplingParams
from popo_lite.tasks.rendering import Renderer
from popo_lite.tools.plan.shapes import KNOWN_CONFIGS, load_shape, parameter_counts
from popo_lite.tools.tiny_model import build_tokenizer
from popo_lite.trainer import Trainer
from popo_lite.types import FinishReason

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
QUESTION = "What is 3 + 4?"


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the files of a model say besides its shape.

    `tokens` are special tokens by their id in the original's vocabulary; `declared` is the tokenizer class that
    tokenizer_config.json names and `loaded` the one that transformers makes of it.
    """

    architecture: str
    template: str
    tokens: Mapping[int, str]
    eos: str
    bos: str | None
    stops: frozenset[str]
    declared: str
    loaded: str
    prompt: str
    biased: frozenset[str] = frozenset()


CHATML = Family(
    architecture="Qwen2ForCausalLM",
    # As Qwen2.5-Math's, with its own system prompt if there is none.
    template=r"{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n"
    + BOXED.replace("\\", r"\\")
    + r"<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    tokens={151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>"},
    eos="<|endoftext|>",
    bos=None,
    stops=frozenset({"<|endoftext|>", "<|im_end|>"}),
    declared="Qwen2Tokenizer",
    loaded="Qwen2Tokenizer",
    prompt=f"<|im_start|>system\n{BOXED}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
    biased=frozenset({"q_proj", "k_proj", "v_proj"}),
)
R1_DISTILL = Family(
    architecture="Qwen2ForCausalLM",
    template="{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}",
    tokens={
        151643: "<｜end▁of▁sentence｜>",
        151644: "<｜User｜>",
        151645: "<｜Assistant｜>",
        151646: "<｜begin▁of▁sentence｜>",
    },
    eos="<｜end▁of▁sentence｜>",
    bos="<｜begin▁of▁sentence｜>",
    stops=frozenset({"<｜end▁of▁sentence｜>"}),
    declared="LlamaTokenizerFast",
    loaded="Qwen2Tokenizer",
    prompt=f"<｜begin▁of▁sentence｜><｜User｜>{QUESTION}\n{BOXED}<｜Assistant｜><think>\n",
    biased=frozenset({"q_proj", "k_proj", "v_proj"}),
)
LLAMA = Family(
    architecture="LlamaForCausalLM",
    template="{% set header = '<|start_header_id|>%s<|end_header_id|>\\n\\n' %}{{ bos_token }}"
    "{{ header | format('system') }}Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    "{% for m in messages %}{% if m.role != 'system' %}{{ header | format(m.role) }}{% endif %}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ header | format('assistant') }}{% endif %}",
    tokens={
        128000: "<|begin_of_text|>",
        128001: "<|end_of_text|>",
        128006: "<|start_header_id|>",
        128007: "<|end_header_id|>",
        128008: "<|eom_id|>",
        128009: "<|eot_id|>",
    },
    eos="<|eot_id|>",
    bos="<|begin_of_text|>",
    stops=frozenset({"<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"}),
    declared="PreTrainedTokenizerFast",
    loaded="TokenizersBackend",
    prompt="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    f"Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{BOXED}<|eot_id|>"
    f"<|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)
DEEPSEEK_MATH = Family(
    architecture="LlamaForCausalLM",
    template="{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\\n\\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}"
    "{% else %}{{ m.content + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    tokens={100000: "<｜begin▁of▁sentence｜>", 100001: "<｜end▁of▁sentence｜>"},
    eos="<｜end▁of▁sentence｜>",
    bos="<｜begin▁of▁sentence｜>",
    stops=frozenset({"<｜end▁of▁sentence｜>"}),
    declared="LlamaTokenizerFast",  # which transformers 5 reads wrongly: see the last test
    loaded="TokenizersBackend",
    prompt=f"<｜begin▁of▁sentence｜>User: {QUESTION}\n{BOXED}\n\nAssistant:",
)
FAMILIES = {
    "qwen_1_5b": CHATML,
    "qwen_7b": CHATML,
    "r1_distill_1_5b": R1_DISTILL,
    "r1_distill_7b": R1_DISTILL,
    "llama_8b": LLAMA,
    "deepseek_math_7b": DEEPSEEK_MATH,
}
TIED = {"qwen_1_5b"}


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    names = list(family.tokens.values())
    return PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer().backend_tokenizer,
        pad_token="<|pad|>",
        eos_token=family.eos,
        bos_token=family.bos,
        additional_special_tokens=names,
        chat_template=family.template,
        clean_up_tokenization_spaces=False,
    )


def small_config(model: str, family: Family, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the original's config with two layers of heads of 32, and special tokens by the small tokenizer's ids."""
    config = KNOWN_CONFIGS[model]
    ratio = config["num_attention_heads"] // config["num_key_value_heads"]
    kv_heads = 4 if ratio == 1 else 1
    size = {
        "hidden_size": 32 * ratio * kv_heads,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": ratio * kv_heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": -(-len(tokenizer) // 64) * 64,
    }
    ids = {old: tokenizer.convert_tokens_to_ids(name) for old, name in family.tokens.items()}
    eos = config["eos_token_id"]
    special = {
        "eos_token_id": [ids[one] for one in eos] if isinstance(eos, list) else ids[eos],
        "bos_token_id": ids.get(config["bos_token_id"]),
        "pad_token_id": tokenizer.pad_token_id,
    }
    return config | size | special


def write_model(folder: Path, model: str, family: Family) -> None:
    """Write a folder that `from_pretrained` can load, with random weights."""
    tokenizer = tokenizer_of(family)
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**small_config(model, family, tokenizer)))
    assert type(built).__name__ == family.architecture
    built.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    declare(folder, family.declared)


def declare(folder: Path, tokenizer_class: str) -> None:
    """Name the tokenizer's class as the Hub's files do, which transformers did not write."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("backend", None)
    path.write_text(json.dumps(config | {"tokenizer_class": tokenizer_class}))


@pytest.fixture(scope="module")
def rewards(tmp_path_factory) -> Iterator[str]:
    """Give a reward function that is 1 for half of random texts: random weights never add correctly."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "family_rewards.py").write_text("def even(text, problem):\n    return float(len(text) % 2 == 0)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield "family_rewards:even"


def recipe_of(name: str, folder: Path, rewards: str) -> Recipe:
    """Return the shipped recipe of that name with overrides that make it small."""
    return load_recipe(
        name,
        (
            f"model.id={folder}", "model.dtype=float32", "train.device=cpu", "train.cpu_threads=1", "train.steps=1",
            "rollout.engine=hf", "rollout.max_completion_length=24", "train.tokens_per_microbatch=1024",
            "data.dataset=arithmetic", "data.prompts_per_step=3", f"reward.functions={rewards}",
            "reward.truncated=grade",  # random weights hardly ever end an answer
            "optimizer.warmup_ratio=0.0", "eval.dataset=arithmetic", "eval.problems=0",
        ),
    )  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def named(request, tmp_path_factory) -> tuple[str, Family, Path]:
    name, family = request.param, FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(name)
    write_model(folder, load_recipe(f"{name}_lora").model.id, family)
    return name, family, folder


def test_one_step_of_both_recipes_on_the_real_architecture(named, rewards, tmp_path):
    name, _, folder = named
    lines = {}
    for kind in ("lora", "grpo"):
        (tmp_path / kind).mkdir()
        with Trainer(recipe_of(f"{name}_{kind}", folder, rewards), Callback()) as trainer:
            before = {key: p.detach().clone() for key, p in trainer.policy.trainable_parameters()}
            assert trainer.run(RunFolder(tmp_path / kind)).summary is not None
            moved = {key for key, p in trainer.policy.trainable_parameters() if not torch.equal(p, before[key])}
            assert trainer.policy.quantized_modules == 14
        [line] = json_lines(tmp_path / kind / "metrics.jsonl")
        assert line["skipped_reason"] is None
        assert 0 < line["positives"] < line["rollouts"] == 24
        assert line["grad_norm"] > 0
        assert line["logp_gap_max"] < 1e-4
        # B starts at zero, so in the first step it alone of the adapters has a gradient; A only decays.
        assert {key for key in before if ".lora_B." in key} <= moved
        assert any(key.startswith("predictor.") for key in moved) is (kind == "lora")
        lines[kind] = line
    # The same answers; GRPO learns from the wrong ones too.
    assert lines["grpo"]["rollout_tokens"] == lines["lora"]["rollout_tokens"]
    assert lines["grpo"]["positives"] == lines["lora"]["positives"]
    assert lines["grpo"]["trained_tokens"] > lines["lora"]["trained_tokens"]
    for key in ("tokens_of_all", "tokens_of_positives", "tokens_of_mixed_groups"):
        assert lines["grpo"][key] == lines["lora"][key], key
    for kind, total in (("lora", "tokens_of_positives"), ("grpo", "tokens_of_all")):  # all for GRPO's KL term
        assert lines[kind]["shared_tokens"] > 0
        assert lines[kind]["trained_tokens"] + lines[kind]["shared_tokens"] == lines[kind][total]


def test_the_model_is_the_original_in_all_but_size(named):
    name, family, folder = named
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == family.architecture
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied is (name in TIED)
    biased = {key.split(".")[-2] for key, _ in model.named_parameters() if key.endswith(".bias")}
    assert biased == family.biased
    assert sum(p.numel() for p in model.parameters()) == sum(
        parameter_counts(load_shape(ModelRecipe(id=str(folder)))).values()
    )
    original = AutoConfig.for_model(**KNOWN_CONFIGS[load_recipe(f"{name}_lora").model.id])
    assert model.config.rope_parameters == original.rope_parameters
    assert model.config.max_position_embeddings == original.max_position_embeddings
    if family is LLAMA:
        unscaled = 1 / model.config.rope_parameters["rope_theta"] ** (torch.arange(0, 32, 2) / 32)
        scale = model.model.rotary_emb.inv_freq / unscaled
        assert scale[0] == pytest.approx(1)  # short waves stay, long ones are stretched by the factor
        assert scale[-1] == pytest.approx(1 / 8)


@pytest.mark.parametrize("kind", ["lora", "grpo"])
def test_prompts_are_in_the_familys_own_format(named, kind, rewards):
    name, family, folder = named
    recipe = recipe_of(f"{name}_{kind}", folder, rewards)
    tokenizer = load_tokenizer(recipe.model)
    assert type(tokenizer).__name__ == family.loaded
    renderer = Renderer(recipe, tokenizer)
    problem = first_problem(recipe)
    ids = renderer.token_ids(problem)
    assert tokenizer.decode(ids) == family.prompt.replace(QUESTION, problem.question)
    # Special tokens are single ids, not their characters, and the text does not begin twice.
    for text in family.tokens.values():
        assert ids.count(tokenizer.convert_tokens_to_ids(text)) == family.prompt.count(text)


def first_problem(recipe: Recipe):
    from popo_lite.tasks import open_tasks

    return open_tasks(recipe)[0].train_problem(0, 0)


def test_answers_end_at_the_familys_stops_and_nowhere_else(named, rewards):
    name, family, folder = named
    recipe = recipe_of(f"{name}_lora", folder, rewards)
    with Trainer(recipe, Callback()) as trainer:
        tokenizer, stops = trainer.policy.tokenizer, trainer.policy.stop_ids
        assert {tokenizer.convert_ids_to_tokens(one) for one in stops} == family.stops
        prompts = [trainer.renderer.render(trainer.train_task.train_problem(0, index)) for index in range(2)]
        answers = [
            answer
            for group in trainer.sampler.sample(
                prompts,
                count=100,
                params=SamplingParams(temperature=1.0, max_completion_length=40),
                policy_version=0,
                stream=("stops",),
            )
            for answer in group
        ]
    ended = [answer for answer in answers if answer.finish_reason is FinishReason.STOP]
    assert {answer.token_ids[-1] for answer in ended} == stops
    for answer in answers:
        assert stops.isdisjoint(answer.token_ids[:-1])
        assert (answer.token_ids[-1] in stops) is (answer.finish_reason is FinishReason.STOP)
        assert answer.finish_reason is FinishReason.STOP or len(answer.token_ids) == 40
        assert not any(token in answer.text for token in family.tokens.values())


# ---------------------------------------------------------------------- templates and tokenizers that cannot be used


class Silent:
    """A model whose config alone names an end."""

    generation_config = None

    def __init__(self, eos: int) -> None:
        self.config = PreTrainedConfig(eos_token_id=eos)


def test_a_template_that_takes_no_assistant_turn_leaves_the_models_own_ends():
    tokenizer = build_tokenizer()
    refuses = "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    with pytest.raises(TemplateError):
        tokenizer.apply_chat_template([{"role": "assistant", "content": "?"}], chat_template=refuses)
    for template in (refuses, "<|user|>{{ messages[0].content }}<|assistant|>"):
        assert stop_ids_of(Silent(7), tokenizer, template) == {7, tokenizer.eos_token_id}


def test_a_template_that_is_not_jinja_names_its_key():
    with pytest.raises(ModelError, match="not valid Jinja") as caught:
        stop_ids_of(Silent(7), build_tokenizer(), "{% for m in messages %}")
    assert caught.value.where == "data.chat_template"


def test_a_template_that_takes_no_system_message_says_so(tiny_recipe):
    refuses = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
    )
    recipe = tiny_recipe(f'data.chat_template="{refuses}"')
    problem = first_problem(recipe)
    assert Renderer(recipe, build_tokenizer()).token_ids(problem)
    recipe = tiny_recipe(f'data.chat_template="{refuses}"', 'data.system_prompt="Be careful."')
    with pytest.raises(ModelError, match=r"takes no system prompt .* \(roles system, user\): no system") as caught:
        Renderer(recipe, build_tokenizer()).token_ids(problem)
    assert caught.value.where == "data.system_prompt"
    assert "--set data.system_prompt=" in caught.value.next_step


def test_a_byte_level_tokenizer_is_not_read_as_another_kind(tmp_path, tiny_recipe):
    """DeepSeek-Math's files say LlamaTokenizerFast; transformers 5 then drops every space, silently."""
    write_model(tmp_path, "deepseek-ai/deepseek-math-7b-instruct", DEEPSEEK_MATH)
    recipe = tiny_recipe(f'model.id="{tmp_path}"')
    broken = AutoTokenizer.from_pretrained(tmp_path)
    assert broken.decode(broken.encode(QUESTION, add_special_tokens=False)) == "Whatis3+4?"
    with pytest.raises(ModelError, match="loaded as LlamaTokenizer, loses"):
        Renderer(recipe, broken)
    tokenizer, original = load_tokenizer(recipe.model), tokenizer_of(DEEPSEEK_MATH)
    assert tokenizer.encode(QUESTION) == original.encode(QUESTION)
    assert tokenizer.chat_template == original.chat_template
    tokenizer.save_pretrained(tmp_path / "exported")  # what others load without knowing of it
    (tmp_path / "exported" / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").encode(QUESTION) == original.encode(QUESTION)
