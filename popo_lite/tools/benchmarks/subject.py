"""Open the weights of a run or any model, sample from them, and evaluate a run on its held-out problems."""

from __future__ import annotations

import hashlib
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import torch

from popo_lite.conversation import RolloutWorker
from popo_lite.errors import DataError, ModelError, UserInputError
from popo_lite.evaluation import check_references, evaluate, fitting, held_out, not_solved
from popo_lite.formats import read_json, reading
from popo_lite.grading import Grader
from popo_lite.policy.adapters import ADAPTER_FILE, empty_adapter, load_adapter_weights
from popo_lite.policy.device import computes_bfloat16, pick_device
from popo_lite.policy.memory import release_memory
from popo_lite.policy.policy import Policy, load_policy, load_trained_policy
from popo_lite.policy.tokens import open_renderer
from popo_lite.recipe import ModelRecipe, Recipe
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder, checkpoint_step, dated
from popo_lite.samplers import Sampler, open_sampler
from popo_lite.samplers.probe import PROBE_PROMPTS, SamplerGuard
from popo_lite.tasks import Task, open_tasks
from popo_lite.tasks.datasets import digests
from popo_lite.tasks.rendering import Renderer
from popo_lite.tools.console.output import notify
from popo_lite.trust import EVALUATION_CODE, refuse_untrusted
from popo_lite.types import EvalResult, Problem, Prompt

RUN_WEIGHTS = ("base", "adapter", "siamese")
MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".gguf")  # files that can change answers
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(description, total) -> a context manager; its value is called with each amount done."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and the sets of weights to evaluate: name -> folder of the adapter, None without one.

    `checkpoint` is the number of steps of a run's checkpoint; None for the end of a run, and for a model.
    """

    name: str
    recipe: Recipe
    adapters: Mapping[str, Path | None]
    checkpoint: int | None = None

    @property
    def digests(self) -> dict[str, str]:
        """Return hashes that identify the state of local weights; empty for a Hub model."""
        weights = {name: adapter / ADAPTER_FILE for name, adapter in self.adapters.items() if adapter}
        digests = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in weights.items()}
        source = Path(self.recipe.model.id).expanduser()
        if source.exists():
            # Names, sizes and times only: hashing a whole model takes minutes.
            every = source.iterdir() if source.is_dir() else [source]
            files = [(file.name, file.stat()) for file in every if file.suffix in MODEL_SUFFIXES]
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


def open_run(path: Path, wanted: Sequence[str], checkpoint: int | str | None = None) -> Subject:
    """Return `wanted` (default: all) weights of a run, of its end or of a `checkpoint` (`RunFolder.find_checkpoint`).

    Raises CheckpointError if there is no such checkpoint. The base needs none.
    """
    if unknown := [wanted] if isinstance(wanted, str) else sorted({*wanted} - {*RUN_WEIGHTS}):
        next_step = f"give a list of some of {', '.join(RUN_WEIGHTS)}"
        raise UserInputError(f"a run has no weights {', '.join(unknown)}", where=str(path), next_step=next_step)
    folder = RunFolder(path)
    recipe = folder.recipe()
    names = wanted or RUN_WEIGHTS
    found = None if set(names) == {"base"} and checkpoint is None else folder.find_checkpoint(checkpoint)
    if set(names) != {"base"}:
        for notice in folder.notices(checkpoint, found):
            notify(f"{path}: {notice}")
    adapters = {
        name: None if name == "base" else folder.trained_adapter("siamese" if name == "siamese" else "policy", found)
        for name in names
    }
    step = checkpoint_step(found) if found else None
    return Subject(name=path.resolve().name, recipe=recipe, adapters=adapters, checkpoint=step)


def open_model(model: str, wanted: Sequence[str], device: str = "auto", checkpoint: int | str | None = None) -> Subject:
    """Return a model by folder, such as an export, GGUF file or Hub id: 16 bit on a GPU, float32 on a CPU.

    `device` is as in `train.device`.

    Raises UserInputError for `wanted` weights or a `checkpoint`, which only a run has, and ModelError for an adapter.
    """
    if checkpoint is not None:
        what = f"{model} is a model, not a run, and has no checkpoints"
        raise UserInputError(what, where="--checkpoint", next_step="leave --checkpoint out, or name a run's folder")
    if wanted:
        what = f"{model} is a model, not a run, and has no {' or '.join(wanted)}"
        raise UserInputError(what, where="--weights", next_step="leave --weights out, or name a run's folder")
    folder = Path(model).expanduser()
    is_path = folder.is_absolute() or model.startswith(".")
    if not folder.exists() and (is_path or any(folder.parent.glob("*/recipe.toml"))):  # a mistyped run is no Hub id
        next_step = "name the folder of a run or of a model, a GGUF file, or a Hub id"
        raise ModelError("there is no such file or folder", where=model, next_step=next_step)
    if folder.is_dir() and not (folder / "config.json").is_file():
        what = "holds neither a run (recipe.toml) nor a model (config.json)"
        next_step = "to evaluate an adapter, name its run's folder; popo-lite export writes merged models"
        raise ModelError(what, where=model, next_step=next_step)
    name = str(folder.resolve()) if folder.exists() else model
    place = pick_device(device)
    narrow: Literal["bfloat16", "float16"] = "bfloat16" if computes_bfloat16(place) else "float16"
    base = ModelRecipe(id=name, quantization="none", dtype="float32" if place.type == "cpu" else narrow)
    return Subject(name=name, recipe=Recipe(model=base), adapters={"model": None})


@contextmanager
def open_checked(
    recipe: Recipe, policy: Policy, renderer: Renderer, prompts: Iterable[Prompt]
) -> Iterator[tuple[Sampler, Grader]]:
    """Open grader and sampler.

    Raises UserInputError if the reward functions cannot be used on the first of `prompts`, and EngineError if these
    show that the sampler ignores its adapter.
    """
    first = list(islice(prompts, PROBE_PROMPTS))
    with Grader(recipe.grading, thinking_open=renderer.opens_thinking) as grader:
        grader.check([prompt.problem for prompt in first])
        with open_sampler(recipe, policy, text=renderer.text, notify=notify) as sampler:
            SamplerGuard(recipe, policy, sampler, notify).prove(first, lambda _: None)
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


def task_run(models: Sequence[str], task: str | None) -> RunFolder | None:
    """Return the run whose problems are asked: `task`, or the first in `models`, or whose export/ holds one of them."""
    if task is not None:
        folder = Path(task).expanduser()
        return RunFolder(folder) if folder.is_dir() else None
    paths = [Path(model).expanduser().resolve() for model in models]
    exporting = (parent.parent for path in paths for parent in path.parents if parent.name == "export")
    return next((RunFolder(path) for path in (*paths, *exporting) if (path / "recipe.toml").is_file()), None)


def task_recipe(models: Sequence[str], task: str | None) -> Recipe:
    """Return the recipe whose problems, prompts, reward and sampling are used: that of `task_run`, or `task` itself."""
    if run := task_run(models, task):
        return run.recipe()
    if task is not None:
        return load_recipe(task)
    what = "is not the folder of a run (recipe.toml is missing) or of a run's export, so there are no problems to ask"
    next_step = "add --task with a run's folder or a recipe, for instance --task tiny_cpu; or add --benchmarks paper"
    raise UserInputError(what, where=models[0], next_step=next_step)


def open_subjects(
    models: Sequence[str], weights: Sequence[str], recipe: Recipe, checkpoint: int | str | None = None
) -> list[Subject]:
    """Return a subject for each run, model folder or Hub id, all with unlike weights' names, to ask by `recipe`.

    `weights` and `checkpoint` are those of the runs.
    """
    if repeated := sorted({model for model in models if models.count(model) > 1}):
        raise UserInputError("is named twice", where=repeated[0], next_step="name every run and model once")
    runs = [model for model in models if (Path(model).expanduser() / "recipe.toml").is_file()]
    subjects = []
    for model in models:
        if model in runs:
            subject = open_run(Path(model).expanduser(), weights, checkpoint)
        else:
            of_runs = () if runs else weights
            subject = open_model(model, of_runs, recipe.train.device, None if runs else checkpoint)
            path = Path(model).expanduser()
            subject = replace(subject, adapters={path.resolve().name if path.exists() else model: None})
        parts = {"model": subject.recipe.model, "lora": subject.recipe.lora}
        subjects.append(replace(subject, recipe=recipe.with_values(parts)))
    names = Counter(name for subject in subjects for name in subject.adapters)
    for index, (model, subject) in enumerate(zip(models, subjects, strict=True)):
        full = {name: f"{model} {name}" if model in runs else model for name in subject.adapters}
        adapters = {full[name] if names[name] > 1 else name: adapter for name, adapter in subject.adapters.items()}
        subjects[index] = replace(subject, adapters=adapters)
    return subjects


def evaluate_models(models: Sequence[str], *, task: str | None = None, weights: Sequence[str] = (),
                    problems: int | None = None, samples: int = 8, temperature: float | None = None, seed: int = 0,
                    engine: str | None = None, checkpoint: int | str | None = None, trust: bool = False,
                    bar: Bar = no_bar) -> list[EvalResult]:  # fmt: skip
    """Return a result for each of a run's `weights` (default: all) and for each other model, on the same draws.

    `task` is a run or recipe: see `task_recipe`. `problems`, `temperature` and `engine` default to its own; `samples`
    is per problem. `checkpoint` is as in `open_run`. With `trust`, code of the runs and `task` is run and remembered.
    One model is in memory at a time.
    """
    values = {"rollout.engine": engine, "eval.temperature": temperature, "eval.samples_per_problem": samples}
    recipe = dated(task_recipe(models, task)).with_values(
        {key: value for key, value in values.items() if value is not None}
    )
    subjects = open_subjects(models, weights, recipe, checkpoint)
    places = dict.fromkeys([*models, *([] if task is None else [task])])
    refuse_untrusted([subject.recipe for subject in subjects], ", ".join(places), trust, only=EVALUATION_CODE)
    if problems is not None and problems < 1:
        raise UserInputError("must be at least 1", where=f"problems = {problems}", next_step="leave it out")
    if problems is None and recipe.eval.problems < 1:
        command = shlex.join(["popo-lite", "eval", *models, *([] if task is None else ["--task", task])])
        what, next_step = "this recipe has no held-out problems", f"{command} --problems 200"
        raise UserInputError(what, where="eval.problems = 0", next_step=next_step)
    asked = open_tasks(recipe)[1]
    chosen = _askable(subjects, held_out(asked, recipe, problems), recipe)
    if (run := task_run(models, task)) and run.data_path.is_file():
        with reading(run.data_path):
            before = dict(read_json(run.data_path)["held_out"])
        now: dict[str, str] = {}
        with suppress(DataError):  # there are fewer than before
            now = digests(asked.held_out(recipe.eval.problems))
        if other := sum(now.get(name) != digest for name, digest in before.items()):
            what = f"{other:,} of {len(before):,} held-out problems changed or are gone since {run.path} was trained"
            notify(f"{what}; those in their place may have been trained on")
    where = "eval.dataset" if recipe.eval.dataset else "data.dataset"
    with Grader(recipe.grading) as grader:
        grader.check()
        unreadable = check_references(chosen, grader, "held-out problems", where)
    for notice in [*asked.notices, *([not_solved(unreadable, len(chosen), "held-out problems")] if unreadable else [])]:
        notify(notice)
    return [result for subject in subjects for result in _answer(subject, asked, chosen, seed, bar)]


def _askable(subjects: Sequence[Subject], problems: Sequence[Problem], recipe: Recipe) -> list[Problem]:
    """Return the problems whose prompts fit all subjects, before any is loaded. Raises DataError as the recipe asks."""
    chosen, next_step = list(problems), "give --task a recipe with a larger rollout.max_prompt_length"
    for subject in subjects:  # a prompt that is too long for one of them is skipped for all
        renderer = open_renderer(subject.recipe)
        chosen = fitting(chosen, renderer, recipe)
        try:
            for problem in chosen:
                renderer.render(problem)
        except DataError as error:
            advice = f'{next_step}, or with data.overlong_prompts = "skip"'
            raise DataError(error.what, where=f"{subject.name}, {error.where}", next_step=advice) from error
        if not chosen:
            what = f"every prompt is longer than rollout.max_prompt_length = {recipe.rollout.max_prompt_length}"
            raise UserInputError(what, where=subject.name, next_step=next_step)
    return chosen


def _answer(subject: Subject, task: Task, problems: Sequence[Problem], seed: int, bar: Bar) -> list[EvalResult]:
    """Load the subject and return a result for each set of its weights."""
    recipe, results = subject.recipe, []
    policy = subject.load(recipe)
    renderer = Renderer(recipe, policy.tokenizer, stop_ids=policy.stop_ids)
    total = len(problems) * recipe.eval.samples_per_problem
    with open_checked(recipe, policy, renderer, map(renderer.render, problems)) as (sampler, grader):
        for name, adapter in subject.adapters.items():
            with active_adapter(adapter, policy, sampler), bar(f"{name}: answers", total) as progress:
                worker = RolloutWorker(recipe=recipe, renderer=renderer, sampler=sampler, grader=grader)
                results.append(evaluate(name, worker, policy.version, task, problems, seed=seed, progress=progress))
    del policy, renderer, sampler, grader, worker
    release_memory()
    return results
