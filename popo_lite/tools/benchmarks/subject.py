"""Open the weights of a run or any model, sample from them, and evaluate a run on its held-out problems."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import click
import torch

from popo_lite.errors import ModelError, UserInputError
from popo_lite.evaluation import evaluate, fitting
from popo_lite.grading import Grader
from popo_lite.policy.adapters import ADAPTER_FILE, empty_adapter, load_adapter_weights
from popo_lite.policy.load import pick_device
from popo_lite.policy.policy import Policy, load_policy, load_trained_policy
from popo_lite.recipe import ModelRecipe, PopoObjective, Recipe
from popo_lite.run_folder import RunFolder
from popo_lite.samplers import Sampler, open_sampler
from popo_lite.samplers.probe import PROBE_PROMPTS, SamplerGuard
from popo_lite.tasks import open_tasks
from popo_lite.tasks.rendering import Renderer
from popo_lite.types import EvalResult, Prompt

RUN_WEIGHTS = ("base", "adapter", "siamese")
MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")  # files that can change answers
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(description, total) -> a context manager; its value is called with each amount done."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and the sets of weights to evaluate: name -> folder of the adapter, None without one."""

    name: str
    recipe: Recipe
    adapters: Mapping[str, Path | None]

    @property
    def digests(self) -> dict[str, str]:
        """Return hashes that identify the state of local weights; empty for a Hub model."""
        weights = {name: adapter / ADAPTER_FILE for name, adapter in self.adapters.items() if adapter}
        digests = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in weights.items()}
        folder = Path(self.recipe.model.id).expanduser()
        if folder.is_dir():
            # Names, sizes and times only: hashing a whole model takes minutes.
            files = [(file.name, file.stat()) for file in folder.iterdir() if file.suffix in MODEL_SUFFIXES]
            states = sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)
            digests["files"] = hashlib.sha256(repr(states).encode()).hexdigest()
        return digests

    def load(self, recipe: Recipe) -> Policy:
        """Return the policy in eval mode; `recipe` is the subject's own with other settings."""
        if recipe.train.cpu_threads:
            torch.set_num_threads(recipe.train.cpu_threads)
        # Only training packs rows, so models whose attention cannot keep packed rows apart can be evaluated too.
        recipe = recipe.with_values({"train.packing": False})
        if adapter := next(filter(None, self.adapters.values()), None):
            return load_trained_policy(recipe, adapter)
        # The base is evaluated without the adapter that the run may have started from.
        policy = load_policy(recipe.with_values({"lora.init_from": None}))
        policy.model.eval()
        return policy


def open_run(path: Path, wanted: Sequence[str]) -> Subject:
    """Return `wanted` (default: all) weights of a run. Raises CheckpointError before its end, except for the base."""
    if unknown := [wanted] if isinstance(wanted, str) else sorted({*wanted} - {*RUN_WEIGHTS}):
        next_step = f"give a list of some of {', '.join(RUN_WEIGHTS)}"
        raise UserInputError(f"a run has no weights {', '.join(unknown)}", where=str(path), next_step=next_step)
    folder = RunFolder(path)
    recipe = folder.recipe()
    adapters = {
        name: None if name == "base" else folder.trained_adapter("siamese" if name == "siamese" else "policy")
        for name in wanted or RUN_WEIGHTS
    }
    return Subject(name=path.resolve().name, recipe=recipe, adapters=adapters)


def open_model(model: str, wanted: Sequence[str]) -> Subject:
    """Return a model by folder, such as an export, or by Hub id: bfloat16 on a GPU, float32 on a CPU.

    Raises UserInputError if `wanted` names weights that only a run has, and ModelError for an adapter's folder.
    """
    if wanted:
        what = f"{model} is a model, not a run, and has no {' or '.join(wanted)}"
        raise UserInputError(what, where="--weights", next_step="leave --weights out, or name a run's folder")
    folder = Path(model).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        what = "holds neither a run (recipe.toml) nor a model (config.json)"
        next_step = "to evaluate an adapter, name its run's folder; popo-lite export writes merged models"
        raise ModelError(what, where=model, next_step=next_step)
    name = str(folder.resolve()) if folder.is_dir() else model
    on_gpu = pick_device("auto").type == "cuda"
    base = ModelRecipe(id=name, quantization="none", dtype="bfloat16" if on_gpu else "float32")
    return Subject(name=name, recipe=Recipe(model=base, objective=PopoObjective()), adapters={"model": None})


@contextmanager
def open_checked(
    recipe: Recipe, policy: Policy, renderer: Renderer, prompts: Iterable[Prompt]
) -> Iterator[tuple[Sampler, Grader]]:
    """Open sampler and grader. Raises EngineError if a few prompts show that the sampler ignores its adapter."""
    notify = partial(click.echo, err=True)
    with Grader(recipe.reward) as grader, open_sampler(recipe, policy, text=renderer.text, notify=notify) as sampler:
        grader.check()
        SamplerGuard(recipe, policy, sampler).prove(list(islice(prompts, PROBE_PROMPTS)), lambda _: None)
        yield sampler, grader


@contextmanager
def active_adapter(adapter: Path | None, policy: Policy, sampler: Sampler) -> Iterator[None]:
    """Load the adapter in a folder, or none, into policy and sampler for the block."""
    if adapter is None:
        # Emptied as well as disabled: an engine with its own copy of the weights is given the adapter, too.
        empty_adapter(policy.model)
    else:
        load_adapter_weights(policy.model, adapter)
    policy.version += 1
    sampler.sync(policy.version)
    with policy.model.disable_adapter() if adapter is None else nullcontext():
        yield


def no_bar(_description: str, _total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show no progress."""
    return nullcontext(lambda _: None)


def evaluate_run(run: Path, *, weights: Sequence[str] = (), problems: int | None = None, samples: int = 8,
                 temperature: float | None = None, seed: int = 0, engine: str | None = None,
                 bar: Bar = no_bar) -> list[EvalResult]:  # fmt: skip
    """Return a result for each of the run's `weights` ("base", "adapter", "siamese"; default: all), on the same draws.

    `problems`, `temperature` and `engine` default to those of the run's recipe; `samples` is per problem.
    """
    subject = open_run(run, weights)
    values = {"rollout.engine": engine, "eval.temperature": temperature, "eval.samples_per_problem": samples}
    recipe = subject.recipe.with_values({key: value for key, value in values.items() if value is not None})
    count = problems or recipe.eval.problems
    if count < 1:
        what, next_step = "this run's recipe has no held-out problems", f"popo-lite eval {run} --problems 200"
        raise UserInputError(what, where="eval.problems = 0", next_step=next_step)
    task = open_tasks(recipe)[1]
    policy = subject.load(recipe)
    renderer = Renderer(recipe, policy.tokenizer)
    held_out = fitting(task.held_out(count), renderer, recipe)
    results = []
    with open_checked(recipe, policy, renderer, map(renderer.render, held_out)) as (sampler, grader):
        for name, adapter in subject.adapters.items():
            with active_adapter(adapter, policy, sampler), bar(f"{name}: answers", len(held_out) * samples) as progress:
                results.append(evaluate(name, recipe, policy, sampler, renderer, grader, task, held_out,
                                        seed=seed, progress=progress))  # fmt: skip
    return results
