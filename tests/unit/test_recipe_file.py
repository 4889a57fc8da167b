"""Test reading recipes and their overrides, every error of a recipe, and that writing loses nothing."""

from __future__ import annotations

import datetime
import random
import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest

from popo_lite.errors import RecipeError
from popo_lite.recipe import OBJECTIVES, Recipe, Section
from popo_lite.recipe_file import (
    SECTIONS,
    TEXTS,
    allowed_values,
    dump_recipe,
    find_recipe,
    flatten,
    keys_of,
    load_recipe,
    sections_of,
    shipped_recipes,
    to_toml,
)
from popo_lite.recipe_rules import IMPOSSIBLE, NOT_RENAMED, RENAMED, impossible_combinations

TOP_P = "is not a setting: positives must be sampled from the policy's whole distribution; leave the key out"
KEYS = {f"{name}.{key}" for kind in OBJECTIVES for name, keys in sections_of(kind).items() for key in keys_of(keys)}
"""Every key of every algorithm."""

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        (tmp_path / "x.toml").write_text(text, encoding="utf-8", newline="\n")
        return "x.toml"

    return write


def errors_of(source: str | Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    assert caught.value.exit_code == 2
    assert caught.value.next_step
    return caught.value.what.split("\n")


# One error, one line.


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[lora]\nrank = 0", "lora.rank = 0: must be a whole number, at least 1 and at most 1024"),
        ("[lora]\nrank = 8.0", "lora.rank = 8.0: must be a whole number, at least 1 and at most 1024"),
        ("[lora]\nrank = true", "lora.rank = true: must be a whole number, at least 1 and at most 1024"),
        ("[lora]\ndropout = 1", "lora.dropout = 1: must be a finite number, at least 0 and below 1"),
        ('[lora]\nalpha = "x"', 'lora.alpha = "x": must be a finite number, above 0'),
        ("[lora]\ntarget_modules = [1]", 'lora.target_modules = [1]: must be "all-linear" or a list of text'),
        ("[lora]\nrslora = 1", "lora.rslora = 1: must be true or false"),
        ("[model]\nid = 1979-05-27", "model.id = 1979-05-27: must be text"),
        ("[objective]\nentropy_coef = nan", "objective.entropy_coef = nan: must be a finite number, at least 0"),
        ("[objective]\nentropy_coef = inf", "objective.entropy_coef = inf: must be a finite number, at least 0"),
        ("[objective]\ntarget_entropy = 0", "objective.target_entropy = 0: must be a finite number, above 0"),
        (
            '[objective]\nalgorithm = "ppo"\nepsilon = 9',
            'objective.algorithm = "ppo": must be one of "popo", "raft", "mixed", "grpo"',
        ),
        (
            "[objective]\nalgorithm = [1]",
            'objective.algorithm = [1]: must be one of "popo", "raft", "mixed", "grpo"',
        ),
        (
            "[objective]\nkl_coef = 0.1",
            'objective.kl_coef = 0.1: unknown key of algorithm "popo"; "grpo" has it in [objective]',
        ),
        (
            '[objective]\nalgorithm = "grpo"\nsimilarity_coef = 0.1',
            'objective.similarity_coef = 0.1: unknown key of algorithm "grpo"; "popo" or "mixed" has it in [objective]',
        ),
        (
            '[objective]\nalgorithm = "grpo"\nnoise_sigma = 0.1',
            'objective.noise_sigma = 0.1: unknown key of algorithm "grpo"; "popo" or "mixed" has it in [objective]',
        ),
        (
            '[objective]\nalgorithm = "raft"\nweights = "mean_logprob"',
            'objective.weights = "mean_logprob": unknown key of algorithm "raft"; "popo" or "mixed" has it in '
            "[objective]",
        ),
        (
            "[train]\nepsilon = 0.1",
            'train.epsilon = 0.1: unknown key of algorithm "popo"; "grpo" has it in [objective]',
        ),
        ('[objective]\nalgorithm = "grpo"\n[train]\nepsilon = 0.1', "train.epsilon = 0.1: belongs to [objective]"),
        ("[data]\nlimit = 0", "data.limit = 0: must be a whole number, at least 1"),
        ("[rollout]\nnum_generations = 1", "rollout.num_generations = 1: must be a whole number, at least 2"),
        (
            '[optimizer]\nschedule = "cosin"',
            'optimizer.schedule = "cosin": must be one of "cosine", "linear", "constant"; did you mean "cosine"?',
        ),
        (
            '[data]\ndataset = "x"\nfilter = { level = [[4]] }',
            "data.filter = { level = [[4]] }: must be a table whose values are true or false, numbers or "
            "text, or lists of these",
        ),
        (
            "[objective]\nentropy_coff = 0.1",
            "objective.entropy_coff = 0.1: unknown key; did you mean objective.entropy_coef?",
        ),
        ("[lora]\nnum_generations = 4", "lora.num_generations = 4: belongs to [rollout]"),
        ("[rollout]\nenforce_eager = true", "rollout.enforce_eager = true: belongs to [rollout.vllm]"),
        ("[train]\ntemperature = 1.0", "train.temperature = 1.0: belongs to [rollout] or [eval]"),
        (
            "[lora]\nlearning_rat = 1.0",
            "lora.learning_rat = 1.0: unknown key; did you mean optimizer.learning_rate?",
        ),
        ('[siamese]\n"a b" = 1', 'siamese."a b" = 1: unknown key; [siamese] has tau, head_width'),
        ("[objectives]\nalpha = 1", "[objectives]: unknown section; did you mean [objective]?"),
        ("rank = 8", "rank = 8: belongs to [lora]"),
        ("train = 5", "train = 5: must be a section, [train]"),
        ("rollout.vllm = 5", "rollout.vllm = 5: must be a section, [rollout.vllm]"),
        ("[[lora]]\nrank = 8", "lora = [{ rank = 8 }]: must be a section, [lora]"),
        ("[rollout]\ntop_p = 0.9", f"rollout.top_p = 0.9: {TOP_P}"),
        (
            '[lora]\ntarget_modules = ["q_proj", "lm_head"]',
            'lora.target_modules = ["q_proj", "lm_head"]: "lm_head" is the LM head, where the loss would ignore an '
            "adapter; leave it out",
        ),
        (
            "[lora]\ntarget_modules = []",
            'lora.target_modules = []: names no module; use "all-linear" or a list of names',
        ),
        (
            '[lora]\ntarget_modules = "q_proj"',
            'lora.target_modules = "q_proj": must be "all-linear" or a list of text',
        ),
        (
            "[data]\nlimit = 100",
            "data.limit = 100: built-in problems are generated and have no such setting; leave the key out",
        ),
        (
            '[eval]\nsplit = "test"',
            'eval.split = "test": describes a dataset, and eval.dataset is not set; set it, or leave this key out',
        ),
    ],
)
def test_an_error_is_one_line_with_file_key_value_and_what_is_allowed(write: Write, text: str, error: str) -> None:
    assert errors_of(write(text)) == [f"x.toml: {error}"]


# Other libraries' names of keys.


@pytest.mark.parametrize(
    ("algorithm", "name", "error"),
    [
        ("popo", "objective.beta", "is called objective.entropy_coef here"),
        ("grpo", "objective.beta", "is called objective.kl_coef here"),
        (
            "raft",
            "objective.beta",
            'is called objective.kl_coef (algorithm "grpo") or objective.entropy_coef '
            '(algorithm "popo" or "mixed" or "grpo") here',
        ),
        ("grpo", "train.beta", "is called objective.kl_coef here"),
        ("popo", "objective.alpha", "is called objective.similarity_coef here"),
        ("popo", "siamese.alpha", "is called objective.similarity_coef here"),
        ("popo", "train.alpha", "belongs to [lora]"),
        ("popo", "objective.tau", "belongs to [siamese]"),
        ("popo", "objective.epsilon_low", 'is called objective.epsilon (algorithm "grpo") here'),
        ("popo", "lora.r", "is called lora.rank here"),
        ("popo", "train.lora_alpha", "is called lora.alpha here"),
        ("popo", "train.max_steps", "is called train.steps here"),
        ("popo", "rollout.batch_size", "is called rollout.max_num_seqs here"),
        ("popo", "train.batch_size", NOT_RENAMED["batch_size"]),
        ("popo", "model.load_in_4bit", 'is model.quantization = "nf4" here'),
    ],
)
def test_a_key_of_another_library_is_told_its_name_here(write: Write, algorithm: str, name: str, error: str) -> None:
    assert errors_of(write(f'[objective]\nalgorithm = "{algorithm}"'), f"{name}=1") == [f"--set {name} = 1: {error}"]
    section, _, key = name.partition(".")
    if section == "objective" and algorithm == "popo" and key == "beta":
        assert errors_of(write(f"{key} = 1")) == [f"x.toml: {key} = 1: {error}"]


def test_other_names_of_keys_are_no_keys_and_mean_keys_that_exist() -> None:
    assert RENAMED.keys() <= KEYS
    names = {name for names in RENAMED.values() for name in names.split()}
    for name in names | NOT_RENAMED.keys():
        assert name not in (KEYS if "." in name else {key.rpartition(".")[2] for key in KEYS})
        if "." in name:
            assert name.rpartition(".")[0] in SECTIONS
    for sentence in NOT_RENAMED.values():
        for key, value in re.findall(r'(\w+(?:\.\w+)+)(?: = (".*?"))?', sentence):
            assert key in KEYS
            if value:
                load_recipe("tiny_cpu", (f"{key}={value}",))


def test_an_unknown_section_without_a_near_name_lists_the_sections(write: Write) -> None:
    assert errors_of(write("[qqq]")) == [f"x.toml: [qqq]: unknown section; there are {', '.join(SECTIONS)}"]


def test_an_error_stays_on_one_line_of_bounded_length(write: Write) -> None:
    [error] = errors_of(write('[train]\nsteps = """\nfirst\nsecond\u2028third\u0085' + 500 * "x" + '"""'))
    assert "second\\u2028third\\u0085xxx" in error
    assert error.endswith(" ...: must be a whole number, at least 1")
    assert len(error) < 200


# All errors at once.


def test_all_errors_of_file_and_overrides_are_reported_together(write: Write) -> None:
    path = write(
        """
        [lora]
        rank = 0
        drpout = 0.1
        [model]
        attn_implementation = "flash_attention_2"
        dtype = "float32"
        [rollout]
        top_k = 50
        num_generations = 4
        [objectiv]
        """
    )
    overrides = ("rollout.num_generations=1", "reward.workers=many", "seed=3", "lor.rank=8", "nonsense", "model.id=")
    assert sorted(errors_of(path, *overrides)) == sorted(
        [
            "x.toml: [objectiv]: unknown section; did you mean [objective]?",
            "x.toml: lora.drpout = 0.1: unknown key; did you mean lora.dropout?",
            "x.toml: lora.rank = 0: must be a whole number, at least 1 and at most 1024",
            'x.toml: model.attn_implementation = "flash_attention_2": needs a 16-bit model.dtype, not "float32"; '
            'use "sdpa"',
            f"x.toml: rollout.top_k = 50: {TOP_P}",
            "--set rollout.num_generations = 1: must be a whole number, at least 2",
            '--set reward.workers = "many": must be a whole number, at least 1 and at most 64',
            "--set seed = 3: belongs to [train]",
            "--set lor.rank = 8: unknown section; did you mean [lora]?",
            '--set "nonsense": must be section.key=value, or section.key= to unset the key',
            "--set model.id: must be text",
        ]
    )


def test_an_override_without_a_value_unsets_a_key_that_may_be_unset(write: Write) -> None:
    path = write('[data]\nsystem_prompt = "Be brief."\n[lora]\ninit_from = "runs/old"\n[model]\nid = "some/model"')
    recipe = load_recipe(path, ["data.system_prompt=", "lora.init_from="])
    assert (recipe.data.system_prompt, recipe.lora.init_from, recipe.model.id) == (None, None, "some/model")
    assert load_recipe(path, ["data.system_prompt=", "data.system_prompt=Add."]).data.system_prompt == "Add."
    # A default in place of what an empty variable of a shell should have held would be another run.
    for override in ("model.id=", "optimizer.learning_rate=", "objective.algorithm=", "model.quantization="):
        assert errors_of(path, override)[0].startswith(f"--set {override[:-1]}: must be "), override
    assert errors_of(path, "lora.ranks=") == ["--set lora.ranks: unknown key; did you mean lora.rank?"]
    assert errors_of(path, "lora=") == ["--set lora: must be a section, [lora]"]


@pytest.mark.parametrize("key", ["data.system_prompt", "data.chat_template", "lora.init_from", "model.revision"])
def test_an_empty_text_says_how_to_unset_the_key(write: Write, key: str) -> None:
    section, _, name = key.partition(".")
    shown = f'{key} = " ": is empty; leave the key out, or unset it by --set {key}='
    path = write(f'[{section}]\n{name} = " "')
    assert errors_of(path) == [f"x.toml: {shown}"]
    assert load_recipe(path, [f"{key}="]) == Recipe()
    assert errors_of(write(""), f'{key}=" "') == [f"--set {shown}"]
    assert errors_of(write(""), 'model.id=""') == ['--set model.id = "": is empty; set it']


def test_a_combination_is_not_reported_if_one_of_its_keys_is_wrong_itself(write: Write) -> None:
    # With the wrong id replaced by its default, "tiny", the backend would be refused as well.
    assert errors_of(write('[model]\nbackend = "unsloth"\nid = 3')) == ["x.toml: model.id = 3: must be text"]


def test_forbidden_combinations_name_keys_and_values_that_exist() -> None:
    fields = {
        f"{name}.{key}": field
        for kind in OBJECTIVES
        for name, section in sections_of(kind).items()
        for key, field in keys_of(section).items()
    }
    for condition in " ".join(IMPOSSIBLE).split():
        key, _, values = condition.partition("=")
        annotation = fields[key.rstrip("!")].annotation
        choices = get_args(annotation) if get_origin(annotation) is Literal else (True, False)
        if get_origin(annotation) is Literal or annotation is bool:
            assert set(values.split("|")) < set(map(str, choices)), condition


def test_a_combination_takes_negative_zero_for_zero_and_a_text_none_for_a_text(write: Write) -> None:
    path = write("[objective]\nentropy_coef = -0.0\ntarget_entropy = 0.3")
    assert [error.partition(" is ")[0] for error in errors_of(path)] == ["x.toml: objective.entropy_coef = -0.0:"]
    path = write('[model]\nbackend = "unsloth"\nid = "some/model"\n[lora]\ninit_from = "None"')
    assert "cannot start from an adapter" in errors_of(path, "model.dtype=bfloat16")[0]


def test_digits_are_refused_without_arithmetic(write: Write) -> None:
    for dataset in ("comparison", "gsm8k", "mine.jsonl"):
        path = write(f'[data]\ndataset = "{dataset}"\ndigits = 3')
        refused = 'x.toml: data.digits = 3: is for the dataset "arithmetic" alone; leave the key out'
        assert errors_of(path) == [refused]
        assert load_recipe(path, ["eval.dataset=arithmetic"]).data.digits == 3


def test_a_combination_names_the_override_that_brought_it_about(write: Write) -> None:
    path = write('[model]\nid = "some/model"\n[train]\ndevice = "cpu"')
    assert errors_of(path, "optimizer.name=paged_adamw8bit", "model.backend=unsloth") == [
        '--set model.backend = "unsloth": needs a CUDA GPU; use "transformers" on a CPU',
        '--set optimizer.name = "paged_adamw8bit": paging needs a GPU; use "adamw8bit" or "adamw" on a CPU',
    ]


# Overrides.


def test_override_values_are_toml_or_else_text(write: Write) -> None:
    recipe = load_recipe(
        write("[lora]\nrank = 0"),
        (
            "lora.rank=4",
            " lora.rank = 8 ",
            "lora.alpha=16",
            'lora.target_modules=["q_proj", "v_proj"]',
            "model.id=Qwen/Qwen2.5-1.5B",
            'model.revision="1234"',
            "data.dataset=a=b",
            "data.filter={ level = [4, 5], hard = true }",
            "train.gradient_checkpointing=false",
        ),
    )
    assert recipe.lora.rank == 8  # the last one wins, also over a wrong value in the file
    assert recipe.lora.alpha == 16.0
    assert recipe.lora.target_modules == ("q_proj", "v_proj")
    assert recipe.model.id == "Qwen/Qwen2.5-1.5B"
    assert recipe.model.revision == "1234"
    assert recipe.data.dataset == "a=b"
    assert recipe.data.filter == {"level": (4, 5), "hard": True}
    assert recipe.train.gradient_checkpointing is False


@pytest.mark.parametrize(
    ("override", "error"),
    [
        (
            "lora.target_modules=[q_proj]",
            'lora.target_modules = "[q_proj]": is not valid TOML; text inside a list or table needs quotes',
        ),
        ("model.id=a\udcff", 'model.id = "a\\udcff": is not UTF-8 text'),
        ("lora.rank=8\n[train]\nsteps=1", 'lora.rank = "8\\n[train]\\nsteps=1": must be a whole number'),
        ("model.revision=1234", "model.revision = 1234: must be text"),
    ],
)
def test_an_override_that_cannot_be_meant_so_is_refused(write: Write, override: str, error: str) -> None:
    [found] = errors_of(write(""), override)
    assert found.startswith(f"--set {error}")


# Files.


def test_an_empty_file_is_the_default_recipe(write: Write) -> None:
    assert load_recipe(write("")) == Recipe()


def test_a_byte_order_mark_is_read_over(write: Write) -> None:
    assert load_recipe(write("\ufeff[lora]\nrank = 3")).lora.rank == 3


def test_a_syntax_error_names_file_line_and_column(write: Write) -> None:
    assert errors_of(write("[lora]\nrank = = 3")) == ["x.toml: not valid TOML: Invalid value (at line 2, column 8)"]
    assert errors_of(write("[lora]\nrank = 3\nrank = 4\n")) == [
        "x.toml: not valid TOML: Cannot overwrite a value (at line 3, column 9)"
    ]
    [error] = errors_of(write('[model]\nid = "'))
    assert error.startswith("x.toml: not valid TOML: ")
    assert error.endswith("(at end of document)")


def test_a_file_that_is_not_utf8_is_refused(write: Write) -> None:
    Path(write("")).write_bytes(b'[model]\nid = "\xff"')
    assert errors_of("x.toml") == ["x.toml: is not UTF-8 text (byte 14)"]


def test_a_missing_file_names_the_nearest_shipped_recipe(write: Write) -> None:
    write("")
    assert errors_of("tiny_cup") == ["tiny_cup: no such recipe; did you mean the shipped recipe tiny_cpu?"]
    assert errors_of("zzz/qq.toml") == ["zzz/qq.toml: no such file"]
    assert errors_of(".") == [".: is a folder, not a recipe"]


def test_a_path_is_never_replaced_by_a_shipped_recipe_of_that_name(write: Write) -> None:
    write("")
    [error] = errors_of("recipes/tiny_cpu.toml")
    assert error.startswith("recipes/tiny_cpu.toml: no such file; did you mean the shipped recipe tiny_cpu?")


def test_a_file_wins_over_a_shipped_recipe(write: Write, tmp_path: Path) -> None:
    assert find_recipe("tiny_cpu") == find_recipe("tiny_cpu.toml") == shipped_recipes()["tiny_cpu"]
    Path(write("")).rename("tiny_cpu.toml")
    assert find_recipe("tiny_cpu.toml").resolve() == tmp_path / "tiny_cpu.toml"


def test_every_shipped_recipe_loads_and_says_what_it_is_and_how_to_run_it() -> None:
    shipped = shipped_recipes()
    folder = Path(__file__).parents[2] / "recipes"
    recipes = set(folder.rglob("*.toml")) - set((folder / "ablations").rglob("*.toml"))
    assert {path.resolve() for path in shipped.values()} == {path.resolve() for path in recipes}
    assert {"tiny_cpu", "qwen_1_5b_lora", "template"} <= shipped.keys()
    for name, path in shipped.items():
        load_recipe(name)
        first, second, *_ = path.read_text(encoding="utf-8").split("\n")
        assert first.startswith("# ")
        assert second.startswith("# popo-lite ")


# Writing.

NASTY = (
    "", " ", '"', "'", "\\", '\\"', '"""', "'''", "\\boxed{}", "\n", "\r\n", "\t\b\f", "a\x00b\x1b[0m\x7f\x85",
    "\u2028\u2029", "häßlich", "数学", "🙂", "# no comment", "module:name", "true", "1.5", "\ufeff", "\\u0041",
    "\ud7ff\ue000",
)  # fmt: skip


def example(annotation: Any, metadata: tuple[Any, ...], source: random.Random) -> Any:
    """A random value that the schema accepts for an annotation."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        metadata = [item for one in arguments[1:] for item in getattr(one, "metadata", ())]
        return example(arguments[0], tuple(metadata), source)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        fields = annotation.model_fields.items()
        values = {f.alias or k: example(f.annotation, tuple(f.metadata), source) for k, f in fields}
        return {key: value for key, value in values.items() if value is not None}
    if origin is Literal:
        return source.choice(arguments)
    if origin in (Union, types.UnionType):
        return example(source.choice(arguments), metadata, source)
    if origin is tuple and ... not in arguments:
        return tuple(example(one, (), source) for one in arguments)
    if origin is tuple and any(hasattr(one, "min_length") for one in metadata):
        return [example(arguments[0], (), source)]
    if origin is tuple:
        return tuple(example(arguments[0], (), source) for _ in range(source.randrange(4)))
    if origin is dict:
        return {text: example(arguments[1], (), source) for text in source.sample(NASTY, source.randrange(4))}
    if annotation is types.NoneType:
        return None
    if annotation is bool:
        return source.random() < 0.5
    if annotation is datetime.date:
        return datetime.date.fromordinal(source.randint(1, 10**6))
    if any(getattr(one, "pattern", None) for one in metadata):
        return "module:name"
    if annotation in (str, Any):
        return "x".join(["", *source.sample(NASTY, source.randrange(4)), ""])  # never empty
    bounds = {name: getattr(m, name) for m in metadata for name in ("ge", "gt", "le", "lt") if hasattr(m, name)}
    low = bounds.get("ge", bounds.get("gt", -1e9 if annotation is float else -(10**9)))
    high = bounds.get("le", bounds.get("lt"))
    if annotation is int:
        return source.randint(low, high if high is not None else 10**30)
    drawn = source.uniform(low, high) if high is not None else low + 10 ** source.uniform(-300, 300)
    return drawn if low < drawn and (high is None or drawn < high) else (low + (high or low + 1)) / 2


def random_recipe(source: random.Random, algorithm: str) -> Recipe:
    """Return a valid recipe with random values, except in keys that would make impossible combinations."""
    drawn = {
        f"{section}.{key}": example(field.annotation, tuple(field.metadata), source)
        for section, keys in sections_of(algorithm).items()
        for key, field in keys_of(keys).items()
    }
    for name, value in drawn.items():
        if isinstance(value, str) and not name.endswith(TEXTS):
            drawn[name] = "".join(filter(str.isprintable, value))
    drawn["objective.algorithm"] = algorithm
    first = (drawn["reward.functions"] or [{"name": "math"}])[0]
    drawn["reward.positive_if"] = source.choice(["total", [first.get("label") or first["name"]]])
    # "arithmetic" is the only one with data.digits, and reasoning-gym's have tasks.
    drawn["data.dataset"] = source.choice([drawn["data.dataset"], "arithmetic", "reasoning-gym:gcd"])
    drawn["eval.dataset"] = source.choice([drawn["eval.dataset"], "reasoning-gym:gcd"])
    drawn["output.hub_model_id"] = source.choice([None, "user/name"])
    drawn["rollout.server.base_urls"] = source.choice([(), ("https://host:8000", "http://[::1]:8000/a~b")])
    while True:
        tables: dict[str, Any] = {}
        for name, value in drawn.items():
            *parents, key = name.split(".")
            table = tables
            for parent in parents:
                table = table.setdefault(parent, {})
            table[key] = value
        recipe = Recipe.model_validate(tables)
        combinations = [names for names, _ in impossible_combinations(recipe)]
        if not combinations:
            return recipe
        for names in combinations:
            # The first key gets its default back, or the next one if the first already has it.
            for name in [name for name in names if name in drawn][:1]:
                del drawn[name]


def test_dumping_and_loading_gives_the_same_recipe(tmp_path: Path) -> None:
    source = random.Random(0)
    path = tmp_path / "dumped.toml"
    changed = set()
    for algorithm in 50 * list(OBJECTIVES):
        recipe = random_recipe(source, algorithm)
        path.write_text(dump_recipe(recipe), encoding="utf-8", newline="\n")
        assert load_recipe(path) == recipe
        assert dump_recipe(load_recipe(path)) == dump_recipe(recipe)
        default = flatten(Recipe.model_validate({"objective": {"algorithm": algorithm}}))
        changed |= {key for key, value in flatten(recipe).items() if value != default.get(key)}
    assert KEYS - changed == {"objective.algorithm"}


def test_an_algorithm_has_the_terms_that_it_names() -> None:
    for algorithm, terms in {
        "popo": (0.1, 0.01, "mean_logprob"),
        "mixed": (0.1, 0.01, "mean_logprob"),
        "raft": (None, None, None),
        "grpo": (None, 0.0, None),
    }.items():
        objective = load_recipe("tiny_cpu", [f"objective.algorithm={algorithm}"]).objective
        assert tuple(getattr(objective, key, None) for key in ("similarity_coef", "entropy_coef", "weights")) == terms
    changed = load_recipe("tiny_cpu", ["objective.algorithm=grpo", "objective.entropy_coef=0.005"])
    assert changed.objective.entropy_coef == 0.005


def test_dumping_leaves_out_no_key_that_is_set() -> None:
    dumped = tomllib.loads(dump_recipe(load_recipe("qwen_1_5b_lora")))
    assert dumped == load_recipe("qwen_1_5b_lora").to_dict()
    assert dumped["data"]["system_prompt"].endswith(r"\boxed{}.")
    assert "revision" not in dumped["model"]


def test_text_survives_toml_on_one_printable_line() -> None:
    for text in (*NASTY, *map(chr, range(0x300))):
        written = to_toml(text)
        assert tomllib.loads(f"value = {written}") == {"value": text}
        assert tomllib.loads(f"value = {to_toml({text: 1})}") == {"value": {text: 1}}
        assert written.isprintable() or any(character in text for character in "\xa0\xad\ufeff\ue000")


@pytest.mark.parametrize("value", [0, -7, 2**70, 0.1, 1e-5, 2e-05, 1.5e-10, 1e16, 1e300, 5e-324, float("inf"), -0.0])
def test_numbers_survive_toml(value: float) -> None:
    read = tomllib.loads(f"value = {to_toml(value)}")["value"]
    assert (read, type(read), str(read)) == (value, type(value), str(value))


def test_allowed_values_are_known_for_every_key() -> None:
    words = {
        f"{section}.{key}": allowed_values(field)
        for section, keys in SECTIONS.items()
        for key, field in keys_of(keys).items()
    }
    assert all(words.values())
    assert words["objective.target_entropy"] == "a finite number, above 0"
    assert words["data.limit"] == "a whole number, at least 1"
    assert words["model.revision"] == "text"
    assert words["siamese.tau"] == "a finite number, at least 0 and below 1"


def test_reading_recipes_imports_nothing_heavy() -> None:
    program = (
        "import sys, popo_lite.recipe_file as r\n"
        "r.load_recipe('tiny_cpu'); r.dump_recipe(r.Recipe())\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'datasets', 'peft'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_other_values_are_set_by_key_and_an_unknown_key_is_an_error():
    recipe = Recipe()
    changed = recipe.with_values({"rollout.adaptive.enabled": True, "lora.rank": 4})
    assert (changed.rollout.adaptive.enabled, changed.lora.rank) == (True, 4)
    assert (recipe.rollout.adaptive.enabled, recipe.lora.rank) == (False, 16)
    with pytest.raises(KeyError, match="ModelRecipe has no key 'attention'"):
        recipe.with_values({"model.attention": "sdpa"})


@pytest.mark.parametrize(
    "override", ["model.id=a\n---\nlicense: mit", "output.dir=\u202egnp.exe", f"data.dataset={'x' * 300}"]
)
def test_a_name_is_printable_and_a_file_can_have_it(override: str) -> None:
    with pytest.raises(RecipeError, match="is not a valid path"):
        load_recipe("tiny_cpu", [override])


def test_a_recipe_written_shows_marks_that_reverse_the_order_of_what_is_read() -> None:
    shown = to_toml("a\u202eb\U000e0041\x9b\ud800")
    assert shown == r'"a\u202eb\U000e0041\u009b\ud800"'


@pytest.mark.parametrize("source", ["x" * 300, "a\nb"])
def test_a_source_that_is_no_path_is_refused(source: str) -> None:
    with pytest.raises(RecipeError, match="is not a valid path"):
        load_recipe(source)
