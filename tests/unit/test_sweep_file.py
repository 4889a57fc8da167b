"""Sweep files: what they stand for, what is refused and how it is said, and the ones that are shipped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from popo_lite.errors import RecipeError
from popo_lite.recipe import OBJECTIVES
from popo_lite.recipe_file import load_recipe, shipped_folder, shipped_recipes, shipped_sweeps
from popo_lite.tools.sweep.folder import SweepFolder, load_sweep

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        path = tmp_path / "x.toml"
        path.write_text(text, encoding="utf-8")
        return Path("x.toml")

    return write


def faults_of(path: Path, *overrides: str, seeds: str | None = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_sweep(path, overrides, seeds)
    assert caught.value.exit_code == 2
    assert caught.value.next_step
    return caught.value.what.split("\n")


def test_variants_differ_from_the_base_in_their_overrides_alone(write: Write) -> None:
    path = write(
        """
recipe = "tiny_cpu"
seeds = "0-2,7"
[set]
train.steps = 5
"lora.rank" = 4
[variants.popo]
[variants.other]
objective.entropy_coef = 0.0
"objective.weights" = "uniform"
[variants.other.data]
digits = 3
"""
    )
    sweep = load_sweep(path, ["lora.rank=8", "objective.entropy_coef=0.5"])
    assert (sweep.name, sweep.seeds) == ("x", (0, 1, 2, 7))
    assert sweep.base == load_recipe("tiny_cpu", ["train.steps=5", "lora.rank=8", "objective.entropy_coef=0.5"])
    popo, other = sweep.variants
    assert (popo.name, popo.recipe) == ("popo", sweep.base)
    assert other.overrides == {"objective.entropy_coef": 0.0, "objective.weights": "uniform", "data.digits": 3}
    # --set changes the base; what makes the variant stays.
    assert other.recipe == load_recipe(
        "tiny_cpu",
        ["train.steps=5", "lora.rank=8", "objective.entropy_coef=0", "objective.weights=uniform", "data.digits=3"],
    )


def test_a_grid_is_every_combination_with_every_variant(write: Write) -> None:
    path = write(
        """
recipe = "tiny_cpu"
[variants.a]
[variants.b]
objective.target = "features"
[over]
"objective.similarity_coef" = [0.05, 0.1]
lora.alpha = [8.0]
lora.target_modules = ["all-linear", ["q_proj", "v_proj"]]
"""
    )
    sweep = load_sweep(path)
    assert sweep.seeds == (0,)
    assert [variant.name for variant in sweep.variants] == [
        f"{name},similarity_coef={coef},alpha=8.0,target_modules={targets}"
        for name in "ab"
        for coef in (0.05, 0.1)
        for targets in ("all-linear", "-q_proj-,-v_proj-")
    ]
    last = sweep.variants[-1].recipe
    assert (last.objective.target, last.objective.similarity_coef, last.lora.alpha) == ("features", 0.1, 8.0)
    assert last.lora.target_modules == ("q_proj", "v_proj")


def test_settings_of_nested_sections(write: Write) -> None:
    path = write(
        """
recipe = "tiny_cpu"
[set]
rollout.vllm.base = "bf16"
[variants.a.rollout.adaptive]
enabled = true
[over]
rollout.adaptive.positives_wanted = [1, 2]
"""
    )
    first, second = load_sweep(path).variants
    assert first.name == "a,positives_wanted=1"
    assert second.overrides == {"rollout.adaptive.enabled": True, "rollout.adaptive.positives_wanted": 2}
    assert second.recipe.rollout.vllm.base == "bf16"


def test_seeds_alone_make_one_variant_and_can_be_replaced(write: Write) -> None:
    path = write('recipe = "tiny_cpu"\nseeds = [3, 1]\n')
    assert [variant.name for variant in load_sweep(path).variants] == ["base"]
    assert load_sweep(path).seeds == (3, 1)
    assert load_sweep(path, seeds=" 0 - 2 , 5").seeds == (0, 1, 2, 5)


@pytest.mark.parametrize("seeds", ["", "a", "3-1", "0,0", "0,x", "-1"])
def test_seeds_that_are_none(write: Write, seeds: str) -> None:
    (fault,) = faults_of(write('recipe = "tiny_cpu"\n'), seeds=seeds)
    assert fault == f'--seeds = "{seeds}": must be different whole numbers, such as 0-4 or 0,2,5'


def test_a_path_is_seen_from_the_sweep_file(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write('recipe = "mine/base.toml"\n').resolve()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "base.toml").write_text("[lora]\nrank = 3\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_sweep(path).base.lora.rank == 3


def test_every_fault_of_file_and_variants_in_one_message_with_the_variants_name(write: Write) -> None:
    path = write(
        """
recipe = "tiny_cpu"
seed = 3
[variants.a]
objective.alpa = 1
lora.rank = 0
[variants."b/c"]
train.seed = 2
rollout.max_completion_length = 100000
[variants.comparison]
rank = 3
"""
    )
    name = "cannot name a folder; use letters, digits and . _ = , + -"
    assert faults_of(path, "train.seed=3", seeds="x") == [
        "x.toml: seed: unknown key; did you mean seeds?",
        "x.toml: variant b/c: train.seed: the sweep sets it; write seeds = [...] at the top of the file",
        "x.toml: variant comparison: rank: must be a recipe key, section.key = value",
        f"x.toml: variant b/c: {name}",
        "x.toml: variant comparison: is the name of one of the sweep's own files or folders",
        '--seeds = "x": must be different whole numbers, such as 0-4 or 0,2,5',
        "--set train.seed: the sweep sets it; give --seeds",
        "x.toml: variant a: objective.alpa = 1: unknown key; did you mean lora.alpha?",
        "x.toml: variant a: lora.rank = 0: must be a whole number, at least 1 and at most 1024",
        # The key to blame is the base's, the variant is still named.
        f"x.toml: variant b/c: {shipped_recipes()['tiny_cpu']}: train.tokens_per_microbatch = 16384: one prompt with "
        "its answer may take 100064 tokens; set at least that",
    ]


@pytest.mark.parametrize(
    ("text", "overrides", "fault"),
    [
        ("seeds = [0]", (), "x.toml: recipe: must name the base recipe, a shipped one or a path ending in .toml"),
        ('recipe = "tiny_cpu"\nset = 3', (), "x.toml: [set]: must be a table of recipe keys"),
        ('recipe = "tiny_cpu"\n[set]\nlora.rank = 0', (), "x.toml: [set] lora.rank = 0: must be a whole "
         "number, at least 1 and at most 1024"),
        ('recipe = "tiny_cpu"', ("lora.rank=0",), "--set lora.rank = 0: must be a whole number, at least 1 and "
         "at most 1024"),
        ('recipe = "tiny_cpu"\nover = { "lora.rank" = 4 }', (), "x.toml: over: lora.rank: must be a list of values"),
        ('recipe = "tiny_cpu"\nover = { "lora.rank" = [] }', (), "x.toml: over: lora.rank: must be a list of values"),
        ('recipe = "tiny_cpu"\nover = { "lora.rank" = [4, 4] }', (), "x.toml: variant rank=4: is there twice"),
        ('recipe = "tiny_cpu"', ("lora.rank=4", " train.seed = 3"), "--set train.seed: the sweep sets it; give "
         "--seeds"),
        ('recipe = "tiny_cpu"\nset = { lora.rank = 4, "lora.rank" = 8 }', (), "x.toml: [set]: lora.rank: is there "
         "twice, with and without quotes"),
        ('recipe = "tiny_cpu"\n[variants.a]\n"lora.rank" = 4\n[variants.a.lora]\nrank = 8', (), "x.toml: variant a: "
         "lora.rank: is there twice, with and without quotes"),
        ('recipe = "tiny_cpu"\n[variants.popo]\n[variants.Popo]\nlora.rank = 4', (), "x.toml: variant Popo: differs "
         "from popo in case alone, which some file systems ignore"),
        (f'recipe = "tiny_cpu"\n[variants.{"v" * 201}]', (), f"x.toml: variant {'v' * 40}...: is longer than 200 "
         "characters"),
        ('recipe = "tiny_cpu"\nvariants = 3', (), "x.toml: variants: must be tables, [variants.name]"),
        ('recipe = "tiny_cpu"\nseeds = [0, true]', (), "x.toml: seeds = [0, true]: must be different whole numbers, "
         "such as 0-4 or 0,2,5"),
    ],
)  # fmt: skip
def test_one_fault(write: Write, text: str, overrides: tuple[str, ...], fault: str) -> None:
    assert faults_of(write(text), *overrides) == [fault]


@pytest.mark.parametrize(
    "name", ["comparison", "Comparison", "failures.jsonl", "recipe.toml", "results.jsonl", "sweep.toml"]
)
def test_names_that_the_sweep_itself_needs(write: Write, name: str) -> None:
    (fault,) = faults_of(write(f'recipe = "tiny_cpu"\n[variants."{name}"]'))
    assert fault == f"x.toml: variant {name}: is the name of one of the sweep's own files or folders"


def test_what_was_asked_is_a_sweep_file_that_asks_the_same(write: Write, tmp_path: Path) -> None:
    path = write(
        """
recipe = "tiny_cpu"
seeds = "0-1"
set = { "train.steps" = 5, "lora.rank" = 4 }
[variants.popo]
[variants."b.1"]
model.id = 'a "quoted" one'
data = { dataset = "gsm8k", filter = { level = [4, 5] } }
[over]
objective.entropy_coef = [0.0, 1e-3]
"""
    )
    sweep = load_sweep(path, ["lora.rank = 8", "model.id=some one's"])
    assert sweep.shared == {"train.steps": 5, "lora.rank": 8, "model.id": "some one's"}
    folder = SweepFolder(tmp_path / "sweep")
    folder.start_files(sweep)
    again = load_sweep(folder.sweep_path)
    for part in ("shared", "base", "seeds", "variants"):
        assert getattr(again, part) == getattr(sweep, part), part


def test_every_algorithm_can_be_swept(write: Write) -> None:
    values = ", ".join(f'"{name}"' for name in OBJECTIVES)
    sweep = load_sweep(write(f'recipe = "tiny_cpu"\nover = {{ "objective.algorithm" = [{values}] }}'))
    assert [variant.recipe.objective.algorithm for variant in sweep.variants] == list(OBJECTIVES)


def test_every_shipped_sweep_loads_and_is_no_recipe() -> None:
    shipped = shipped_sweeps()
    ablations = set((shipped_folder() / "ablations").rglob("*.toml"))
    assert set(shipped.values()) == ablations
    assert ablations.isdisjoint(shipped_recipes().values())
    assert {
        "components",
        "tiny_components",
        "tau",
        "similarity_coef",
        "entropy_coef",
        "num_generations",
        "normalizer",
    } <= shipped.keys()
    for name, path in shipped.items():
        first, second, *_ = path.read_text(encoding="utf-8").split("\n")
        assert first.startswith("# ")
        assert second == f"# popo-lite sweep {name}"
        sweep = load_sweep(name)
        assert len(sweep.variants) >= 3
        recipes = [variant.recipe for variant in sweep.variants]
        assert all(recipe not in recipes[:index] for index, recipe in enumerate(recipes)), name


def test_the_components_are_those_of_the_method() -> None:
    for name in ("components", "tiny_components"):
        popo, *without = load_sweep(name).variants
        assert popo.overrides == {}
        assert [dict(variant.overrides) for variant in without] == [
            {"objective.weights": "uniform"}, {"objective.similarity_coef": 0.0}, {"siamese.tau": 0.0},
            {"objective.entropy_coef": 0.0}, {"objective.noise_sigma": 0.0}, {"objective.target": "features"},
        ]  # fmt: skip


def test_group_sizes_are_swept_at_equal_rollouts() -> None:
    recipes = [variant.recipe for variant in load_sweep("num_generations").variants]
    assert [recipe.rollout.num_generations for recipe in recipes] == [4, 8, 16]
    assert {recipe.rollout.num_generations * recipe.data.prompts_per_step for recipe in recipes} == {256}


def test_an_unknown_sweep_names_the_nearest(write: Write) -> None:
    with pytest.raises(RecipeError, match="componets: no such sweep file; did you mean the shipped sweep components?"):
        load_sweep("componets")


def test_planning_and_comparing_need_no_torch() -> None:
    code = (
        "import sys, popo_lite.tools.sweep.runner, popo_lite.tools.sweep.compare, popo_lite.tools.sweep.report\n"
        "sys.exit(bool({'torch', 'matplotlib'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_set_takes_settings_that_are_tables(write: Write) -> None:
    path = write('recipe = "tiny_cpu"\n[variants.a]\nlora.rank = 4\n')
    functions = 'reward.functions=["math", {name="length", max=40}]'
    sweep = load_sweep(path, [functions, 'lora.target_modules=["q_proj"]'])
    for recipe in (sweep.base, sweep.variants[0].recipe):
        assert [function.name for function in recipe.reward.functions or ()] == ["math", "length"]
        assert recipe.lora.target_modules == ("q_proj",)
