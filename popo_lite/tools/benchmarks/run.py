"""Prepare benchmarks, sample and grade the answers to them, and keep these in a folder."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

from popo_lite.errors import CheckpointError, DataError, ModelError
from popo_lite.evaluation import not_solved
from popo_lite.formats import read_json, reading
from popo_lite.grading import Grader
from popo_lite.lock import locked
from popo_lite.policy.load import load_config
from popo_lite.policy.parts import context_of
from popo_lite.policy.tokens import open_renderer
from popo_lite.recipe import Recipe
from popo_lite.run_folder import append_line, differences, environment, flat, keep_lines, read_lines, write_json
from popo_lite.samplers import SamplingParams, pick_engine
from popo_lite.tasks.rendering import Renderer
from popo_lite.tools.benchmarks.datasets import BENCHMARKS, open_benchmark, unreadable_references, within_tolerance
from popo_lite.tools.benchmarks.scores import Answers, refuse_ungraded
from popo_lite.tools.benchmarks.subject import Bar, Subject, active_adapter, open_checked
from popo_lite.tools.console.output import notify
from popo_lite.tools.work_folder import refuse_foreign
from popo_lite.types import Completion, FinishReason, Outcome, Problem, Prompt, Reward

KEY = ("weights", "seed", "benchmark", "problem")
Key = tuple[Any, ...]  # the values of KEY, which identify a line of problems.jsonl
CHUNK_BATCHES = 4  # of sequences: enough to keep an engine busy, few enough to lose little when killed


class PreparedBenchmark(NamedTuple):
    """The prompts of one benchmark, and the limits on them and on answers in tokens."""

    name: str
    prompts: tuple[Prompt, ...]
    longest_prompt: int
    max_completion_length: int
    settings: Mapping[str, Any]  # for settings.json: what the answers depend on, with a hash of all that is asked
    contents: Mapping[str, Any]  # for results.json: what the benchmark consists of
    unreadable: Mapping[str, str]  # problem id -> why nothing can be graded against its answer


def prepare_all(recipe: Recipe, files: Mapping[str, Path | None], *, skip_overlong: bool) -> list[PreparedBenchmark]:
    """Read, check and render benchmarks (name -> file, None for the Hub's) without loading a model."""
    renderer = open_renderer(recipe)
    problems = {name: open_benchmark(name, file) for name, file in files.items()}
    with Grader(recipe.grading) as grader:
        unreadable = unreadable_references([*chain.from_iterable(problems.values())], grader)
    context = context_of(load_config(recipe.model))
    limits: dict[str, Any] = {"max_completion_length": recipe.rollout.max_completion_length, "context_tokens": context}
    limits |= {"skip_overlong": skip_overlong, "unreadable": unreadable}
    return [prepare(name, rows, renderer, **limits) for name, rows in problems.items()]


def prepare(name: str, problems: Sequence[Problem], renderer: Renderer, *, max_completion_length: int,
            context_tokens: int, skip_overlong: bool, unreadable: Mapping[str, str] | None = None,
            ) -> PreparedBenchmark:  # fmt: skip
    """Render `problems`, and limit answers to what the longest prompt leaves of the context.

    `unreadable` maps ids of problems, also others, to why nothing can be graded against their answers. Prints what is
    unusual to standard error. Raises DataError for prompts longer than the renderer's `max_prompt_length`, unless
    `skip_overlong`, and ModelError if the context has no tokens left for an answer.
    """
    prompts = [Prompt(problem=problem, token_ids=renderer.token_ids(problem)) for problem in problems]
    fitting = tuple(prompt for prompt in prompts if len(prompt.token_ids) <= renderer.max_prompt_length)
    rows, published, skipped = len(prompts), BENCHMARKS[name].problems, len(prompts) - len(fitting)
    if not fitting or (skipped and not skip_overlong):
        size, longest = max(((len(p.token_ids), p.problem.id) for p in prompts), key=lambda pair: pair[0])
        what = f"{skipped} of {rows} prompts are longer than {renderer.max_prompt_length} tokens, "
        what += f"the longest, {longest}, has {size}"
        raise DataError(what, where=name, next_step=f"--max-prompt-tokens {size}, or skip them with --skip-overlong")
    longest_prompt = max(len(prompt.token_ids) for prompt in fitting)
    limit = min(max_completion_length, context_tokens - longest_prompt)
    if limit < 1:
        what = f"the longest prompt leaves no tokens for an answer in the model's context of {context_tokens}"
        next_step = f"--max-prompt-tokens below {context_tokens}, and skip longer ones with --skip-overlong"
        raise ModelError(what, where=name, next_step=next_step)
    first = {prompt.token_ids: prompt.problem.id for prompt in reversed(prompts)}
    repeats = {p.problem.id: first[p.token_ids] for p in prompts if first[p.token_ids] != p.problem.id}
    unreadable = {p.problem.id: why for p in fitting if (why := (unreadable or {}).get(p.problem.id))}
    pairs = ", ".join(f"{later} is {earlier}" for later, earlier in islice(repeats.items(), 5))
    for applies, note in (
        (rows != published, f"was published with {published:,} problems, and has {rows:,} here"),
        (repeats, f"{len(repeats)} of {rows} questions repeat an earlier one, and count each time: {pairs}"),
        (skipped, f"{skipped} of {rows} prompts are skipped"),
        (unreadable, not_solved(unreadable, rows, "problems")),
        (limit < max_completion_length, f"answers end at {limit:,} tokens instead of {max_completion_length:,}, as the "
         f"longest prompt takes {longest_prompt:,} of the context of {context_tokens:,}"),
    ):  # fmt: skip
        if applies:
            notify(f"{name}: {note}")
    asked = [[p.problem.id, p.token_ids, p.problem.answer, dict(p.problem.meta)] for p in prompts]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    settings = {"problems": len(fitting), "skipped": skipped, "max_completion_length": limit, "digest": digest}
    contents = {"rows": rows, "published": published, "skipped": skipped, "unreadable": unreadable, "repeats": repeats}
    return PreparedBenchmark(name, fitting, longest_prompt, limit, settings, contents, unreadable)


def settings_of(subject: Subject, prepared: Sequence[PreparedBenchmark], sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that the answers depend on, for settings.json; `sampling` holds `seeds`, `samples` and `top_p`."""
    recipe = subject.recipe
    return {
        "model": subject.name,
        "base": recipe.model.model_dump(),
        "weights": list(subject.adapters),
        "digests": subject.digests,
        "benchmarks": {benchmark.name: benchmark.settings for benchmark in prepared},
        **sampling,
        "temperature": recipe.eval.temperature,
        "system_prompt": recipe.data.system_prompt,
        "chat_template": recipe.data.chat_template,
        "date": str(recipe.data.date),
        "max_prompt_length": recipe.rollout.max_prompt_length,
        "engine": pick_engine(recipe)[0],
        "engine_base": recipe.rollout.vllm.base,
        "max_num_seqs": recipe.rollout.max_num_seqs,
        "max_answer_characters": recipe.reward.max_answer_characters,
        "timeout_seconds": recipe.reward.timeout_seconds,
    }


class EvaluationFolder:
    """Paths inside one evaluation's folder, and the answers in it, with which a killed evaluation resumes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings_path = path / "settings.json"
        self.answers_path = path / "problems.jsonl"  # one line per weights, seed, benchmark and problem

    def date(self) -> datetime.date:
        """Return the date in prompts: that of the evaluation here, or today."""
        settings = read_json(self.settings_path) if self.settings_path.is_file() else {}
        with reading(self.settings_path):
            return datetime.date.fromisoformat(settings["date"]) if "date" in settings else datetime.date.today()

    def locked(self) -> AbstractContextManager[int]:
        """Lock the folder. Raises UserInputError if another evaluation runs in it, or it holds something else."""
        lock = self.path / ".evaluation.lock"
        if not self.settings_path.is_file():
            refuse_foreign(self.path, "evaluation", {lock})
        return locked(lock, "another evaluation is running in this folder", "wait for it, stop it, or change --output")

    def start(self, settings: Mapping[str, Any]) -> None:
        """Write the settings. Raises CheckpointError if the folder holds an evaluation with other settings."""
        if not self.settings_path.is_file():
            write_json(self.settings_path, settings)
            return
        before = read_json(self.settings_path)
        if changed := differences(flat(before), flat(json.loads(json.dumps(settings)))):
            changed[5:] = [f"{len(changed) - 5} more differ"] if len(changed) > 5 else []
            what = f"the evaluation in this folder has other settings: {'; '.join(changed)}"
            next_step = "use the same settings to resume it, or name another folder with --output"
            raise CheckpointError(what, where=str(self.settings_path), next_step=next_step)

    def resume(self, chunks: Sequence[Collection[Key]]) -> dict[Key, Answers]:
        """Return the answers of all finished chunks by key, and delete those of unfinished ones from the file.

        Sampling an unfinished chunk again as a whole gives the lines that an evaluation without interruption writes.
        Raises CheckpointError if a line belongs to no chunk or occurs twice.
        """
        if not self.answers_path.is_file():
            return {}
        keep_lines(self.answers_path, lambda _: True)  # deletes an incomplete last line
        answers: dict[Key, Answers] = {}
        planned = set().union(*chunks)
        for number, line in enumerate(read_lines(self.answers_path), 1):
            with reading(self.answers_path, f"line {number}"):
                unplanned = (key := tuple(map(line.get, KEY))) not in planned
            if unplanned or key in answers:
                what = f"line {number} {'repeats another one' if key in answers else 'is not of this evaluation'}"
                next_step = "the file was changed; restore it, or start again in another folder with --output"
                raise CheckpointError(what, where=str(self.answers_path), next_step=next_step)
            answers[key] = line
        finished = {key for chunk in chunks if answers.keys() >= set(chunk) for key in chunk}
        keep_lines(self.answers_path, lambda line: tuple(map(line.get, KEY)) in finished)
        return {key: line for key, line in answers.items() if key in finished}


def plan_chunks(benchmarks: Sequence[PreparedBenchmark], settings: Mapping[str, Any]) -> list[dict[Key, Prompt]]:
    """Return all prompts in order, in chunks that are sampled together: one benchmark, set of weights and seed each."""
    size = max(1, CHUNK_BATCHES * settings["max_num_seqs"] // settings["samples"])
    return [
        {(weights, seed, benchmark.name, p.problem.id): p for p in benchmark.prompts[start : start + size]}
        for weights in settings["weights"]
        for seed in settings["seeds"]
        for benchmark in benchmarks
        for start in range(0, len(benchmark.prompts), size)
    ]


def answer_all(
    subject: Subject, prepared: list[PreparedBenchmark], folder: EvaluationFolder, settings: Mapping[str, Any], bar: Bar
) -> list[Answers]:
    """Return all answers in order: those in `folder`, and the others, which are sampled and appended there."""
    chunks = plan_chunks(prepared, settings)
    answers = folder.resume(chunks)
    todo = [chunk for chunk in chunks if answers.keys().isdisjoint(chunk)]
    if answers:
        notify(f"{len(chunks) - len(todo)} of {len(chunks)} parts are in {folder.path} already")
    if todo:
        # Enough tokens for the longest prompt, and for every benchmark's longest prompt with its answer.
        prompt = max(benchmark.longest_prompt for benchmark in prepared)
        both = max(benchmark.longest_prompt + benchmark.max_completion_length for benchmark in prepared)
        lengths = {"rollout.max_prompt_length": prompt, "rollout.max_completion_length": both - prompt}
        recipe = subject.recipe.with_values(lengths)
        policy = subject.load(recipe)
        write_json(folder.path / "environment.json", environment(policy.device))
        renderer = Renderer(recipe, policy.tokenizer, stop_ids=policy.stop_ids)
        draw = {"temperature": settings["temperature"], "top_p": settings["top_p"]}
        by_name = {benchmark.name: benchmark for benchmark in prepared}
        with open_checked(recipe, policy, renderer, prepared[0].prompts) as (sampler, grader):
            for weights, group in groupby(todo, lambda chunk: next(iter(chunk))[0]):
                own, adapter = list(group), subject.adapters[weights]
                total = settings["samples"] * sum(map(len, own))
                with active_adapter(adapter, policy, sampler), bar(f"{weights}: answers", total) as finished:
                    for chunk in own:
                        _, seed, name, _ = next(iter(chunk))
                        params = SamplingParams(max_completion_length=by_name[name].max_completion_length, **draw)
                        # Draws depend only on seed, problem and sample: all weights are compared on the same ones.
                        completions = sampler.sample(
                            list(chunk.values()), count=settings["samples"], params=params,
                            policy_version=policy.version, stream=("benchmark", seed), finished=finished)  # fmt: skip
                        lines = _grade(chunk, completions, grader, by_name[name].unreadable)
                        answers |= lines
                        # Checked before they are written, so that a rerun grades them again.
                        so_far = [line for key, line in answers.items() if (key[0], key[2]) == (weights, name)]
                        planned = len(by_name[name].prompts) * len(settings["seeds"])
                        refuse_ungraded(so_far, planned=planned, limit=recipe.reward.max_ungraded_ratio)
                        for line in lines.values():
                            append_line(folder.answers_path, line)
    return [answers[key] for chunk in chunks for key in chunk]


def _grade(chunk: Mapping[Key, Prompt], completions: Sequence[Sequence[Completion]], grader: Grader,
           unreadable: Mapping[str, str]) -> dict[Key, Any]:  # fmt: skip
    """Return the lines of a chunk by key. Answers to `unreadable` problems have no verdict."""
    groups = [(key, prompt.problem, group) for (key, prompt), group in zip(chunk.items(), completions, strict=True)]
    readable = [(problem, group) for _, problem, group in groups if problem.id not in unreadable]
    rewards = iter(grader.grade([(answer.text, problem) for problem, group in readable for answer in group]))
    lines = {}
    for key, problem, group in groups:
        reason = unreadable.get(problem.id)
        none = Reward(value=0.0, outcome=Outcome.ERROR)
        verdicts = [none if reason else within_tolerance(next(rewards), problem) for _ in group]
        lines[key] = {
            **dict(zip(KEY, key, strict=True)),
            "reference": problem.answer,
            "answers": [reward.answer for reward in verdicts],
            "outcomes": [reward.outcome.value for reward in verdicts],
            "tokens": [len(completion.token_ids) for completion in group],
            "truncated": [completion.finish_reason is FinishReason.LENGTH for completion in group],
            "text": group[0].text,
            "unreadable": reason,
        }
    return lines
