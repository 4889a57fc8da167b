"""Prepare benchmarks, and sample and grade the answers to them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import click

from popo_lite.errors import DataError, ModelError
from popo_lite.grading import Grader, GradeRequest
from popo_lite.grading.math import normalise, plain_number, unwrap
from popo_lite.policy.load import load_tokenizer
from popo_lite.recipe import Recipe
from popo_lite.run_folder import environment, write_atomically
from popo_lite.samplers import Sampler, SamplingParams, pick_engine
from popo_lite.tasks.rendering import Renderer
from popo_lite.tools.benchmarks.datasets import BENCHMARKS, open_benchmark
from popo_lite.tools.benchmarks.folder import EvaluationFolder
from popo_lite.tools.benchmarks.scores import Key, ProblemAnswers, refuse_ungraded
from popo_lite.tools.benchmarks.subject import Bar, Subject, active_adapter, open_checked
from popo_lite.types import FinishReason, Outcome, Problem, Prompt, Reward

CHUNK_BATCHES = 4
"""Batches of sequences in a chunk: enough to keep an engine busy, few enough to lose little when killed."""

_FRACTION = re.compile(r"([+-]?)(?:\\[dt]?frac\{(\d+)\}\{(0*[1-9]\d*)\}|(\d+)/(0*[1-9]\d*))")


@dataclass(frozen=True, kw_only=True)
class PreparedBenchmark:
    """The prompts of one benchmark and the limit on answers to them, in tokens.

    `contents` says what the benchmark consists of, for results.json; `digest` is a hash of everything that is asked.
    """

    name: str
    prompts: tuple[Prompt, ...]
    longest_prompt: int
    max_completion_length: int
    contents: Mapping[str, Any]
    digest: str


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Problems of one benchmark that are sampled together, under one set of weights and one seed."""

    weights: str
    seed: int
    benchmark: PreparedBenchmark
    prompts: tuple[Prompt, ...]

    @property
    def keys(self) -> list[Key]:
        """Return the keys of its lines, in order."""
        return [(self.weights, self.seed, self.benchmark.name, prompt.problem.id) for prompt in self.prompts]


def prepare_all(
    subject: Subject, recipe: Recipe, files: Mapping[str, Path | None], *, skip_overlong: bool
) -> list[PreparedBenchmark]:
    """Read, check and render benchmarks (name -> file, None for the Hub's) without loading a model.

    Prints what is unusual about them to standard error.
    """
    renderer = Renderer.of(recipe, load_tokenizer(recipe.model))
    with Grader(recipe.reward) as grader:
        check = partial(check_references, grader=grader)
        problems = {name: open_benchmark(name, file, check_references=check) for name, file in files.items()}
    limits = {"max_completion_length": recipe.rollout.max_completion_length, "context_tokens": subject.context_tokens}
    prepared = [prepare(name, rows, renderer, **limits, skip_overlong=skip_overlong) for name, rows in problems.items()]
    for benchmark in prepared:
        for notice in _notices(benchmark, **limits):
            click.echo(f"{benchmark.name}: {notice}", err=True)
    return prepared


def prepare(
    name: str,
    problems: Sequence[Problem],
    renderer: Renderer,
    *,
    max_completion_length: int,
    context_tokens: int,
    skip_overlong: bool,
) -> PreparedBenchmark:
    """Render `problems`, and limit answers to what the longest prompt leaves of the context.

    Raises DataError for prompts longer than the renderer's `max_prompt_length`, unless `skip_overlong`, and ModelError
    if the context has no tokens left for an answer.
    """
    prompts = [Prompt(problem=problem, token_ids=renderer.token_ids(problem)) for problem in problems]
    fitting = tuple(prompt for prompt in prompts if len(prompt.token_ids) <= renderer.max_prompt_length)
    skipped = len(prompts) - len(fitting)
    if not fitting or (skipped and not skip_overlong):
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        raise DataError(
            f"{skipped} of {len(prompts)} prompts are longer than {renderer.max_prompt_length} tokens, the longest, "
            f"{longest.problem.id}, has {len(longest.token_ids)}",
            where=name,
            next_step=f"--max-prompt-tokens {len(longest.token_ids)}, or skip them with --skip-overlong",
        )
    longest_prompt = max(len(prompt.token_ids) for prompt in fitting)
    if longest_prompt >= context_tokens:
        raise ModelError(
            f"the longest prompt leaves no tokens for an answer in the model's context of {context_tokens}",
            where=name,
            next_step=f"--max-prompt-tokens below {context_tokens}, and skip longer ones with --skip-overlong",
        )
    first: dict[tuple[int, ...], str] = {}
    repeats = {
        prompt.problem.id: earlier
        for prompt in prompts
        if (earlier := first.setdefault(prompt.token_ids, prompt.problem.id)) != prompt.problem.id
    }
    published = BENCHMARKS[name].problems
    asked = [[p.problem.id, p.token_ids, p.problem.answer, dict(p.problem.meta)] for p in prompts]
    return PreparedBenchmark(
        name=name,
        prompts=fitting,
        longest_prompt=longest_prompt,
        max_completion_length=min(max_completion_length, context_tokens - longest_prompt),
        contents={"rows": len(prompts), "published": published, "skipped": skipped, "repeats": repeats},
        digest=hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
    )


def _notices(benchmark: PreparedBenchmark, *, max_completion_length: int, context_tokens: int) -> Iterator[str]:
    rows, published, skipped, repeats = benchmark.contents.values()
    if rows != published:
        yield f"was published with {published:,} problems, and has {rows:,} here"
    if repeats:
        pairs = ", ".join(f"{later} is {earlier}" for later, earlier in islice(repeats.items(), 5))
        yield f"{len(repeats)} of {rows} questions repeat an earlier one, and count each time: {pairs}"
    if skipped:
        yield f"{skipped} of {rows} prompts are skipped"
    if benchmark.max_completion_length < max_completion_length:
        yield (
            f"answers end at {benchmark.max_completion_length:,} tokens instead of {max_completion_length:,}, as the "
            f"longest prompt takes {benchmark.longest_prompt:,} of the context of {context_tokens:,}"
        )


def settings_of(
    subject: Subject, recipe: Recipe, prepared: Sequence[PreparedBenchmark], sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """Return everything that the answers depend on, as plain data.

    `recipe` has the command's options applied; `sampling` holds `seeds`, `samples` and `top_p`.
    """
    return {
        "model": subject.name,
        "base": recipe.model.model_dump(),
        "weights": list(subject.adapters),
        "digests": subject.digests,
        "benchmarks": {
            benchmark.name: {
                "problems": len(benchmark.prompts),
                "skipped": benchmark.contents["skipped"],
                "max_completion_length": benchmark.max_completion_length,
                "digest": benchmark.digest,
            }
            for benchmark in prepared
        },
        **sampling,
        "temperature": recipe.eval.temperature,
        "system_prompt": recipe.data.system_prompt,
        "chat_template": recipe.data.chat_template,
        "max_prompt_length": recipe.rollout.max_prompt_length,
        "engine": pick_engine(recipe)[0],
        "engine_base": recipe.rollout.vllm.base,
        "max_num_seqs": recipe.rollout.max_num_seqs,
        "max_answer_characters": recipe.reward.max_answer_characters,
        "timeout_seconds": recipe.reward.timeout_seconds,
    }


def plan_chunks(
    benchmarks: Sequence[PreparedBenchmark], *, weights: Sequence[str], seeds: Sequence[int], samples: int, batch: int
) -> list[Chunk]:
    """Return everything to sample, in order; `batch` is the number of sequences that are sampled at once."""
    size = max(1, CHUNK_BATCHES * batch // samples)
    return [
        Chunk(weights=name, seed=seed, benchmark=benchmark, prompts=benchmark.prompts[start : start + size])
        for name in weights
        for seed in seeds
        for benchmark in benchmarks
        for start in range(0, len(benchmark.prompts), size)
    ]


def answer_all(
    subject: Subject,
    recipe: Recipe,
    prepared: Sequence[PreparedBenchmark],
    folder: EvaluationFolder,
    *,
    seeds: Sequence[int],
    samples: int,
    top_p: float,
    bar: Bar,
) -> list[ProblemAnswers]:
    """Return all answers in order: those in `folder`, and the others, which are sampled and appended there."""
    batch = recipe.rollout.max_num_seqs
    chunks = plan_chunks(prepared, weights=list(subject.adapters), seeds=seeds, samples=samples, batch=batch)
    answers = folder.resume([chunk.keys for chunk in chunks])
    todo = [chunk for chunk in chunks if chunk.keys[0] not in answers]
    if answers:
        click.echo(f"{len(chunks) - len(todo)} of {len(chunks)} parts are in {folder.path} already", err=True)
    if todo:
        # Enough tokens for the longest prompt, and for every benchmark's longest prompt with its answer.
        prompt = max(benchmark.longest_prompt for benchmark in prepared)
        both = max(benchmark.longest_prompt + benchmark.max_completion_length for benchmark in prepared)
        lengths = {"rollout.max_prompt_length": prompt, "rollout.max_completion_length": both - prompt}
        recipe = recipe.with_values(lengths)
        policy = subject.load(recipe)
        write_atomically(folder.environment_path, json.dumps(environment(policy.device), indent=2) + "\n")
        renderer = Renderer.of(recipe, policy.tokenizer)
        params = {
            each.name: SamplingParams(
                temperature=recipe.eval.temperature,
                top_p=top_p,
                max_completion_length=each.max_completion_length,
            )
            for each in prepared
        }
        with open_checked(recipe, policy, renderer, prepared[0].prompts) as (sampler, grader):
            for name, adapter in subject.adapters.items():
                own = [chunk for chunk in todo if chunk.weights == name]
                if not own:
                    continue
                total = samples * sum(len(chunk.prompts) for chunk in own)
                with active_adapter(adapter, policy, sampler), bar(f"{name}: answers", total) as progress:
                    for chunk in own:
                        benchmark = chunk.benchmark.name
                        lines = _answer(chunk, samples, params[benchmark], policy.version, sampler, grader, progress)
                        answers |= {line.key: line for line in lines}
                        # Checked before they are written, so that a rerun grades them again.
                        refuse_ungraded(
                            [line for line in answers.values() if (line.weights, line.benchmark) == (name, benchmark)],
                            planned=len(chunk.benchmark.prompts) * len(seeds),
                            limit=recipe.reward.max_ungraded_ratio,
                        )
                        folder.append(lines)
    return [answers[key] for chunk in chunks for key in chunk.keys]


def _answer(
    chunk: Chunk,
    samples: int,
    params: SamplingParams,
    policy_version: int,
    sampler: Sampler,
    grader: Grader,
    progress: Callable[[int], None],
) -> list[ProblemAnswers]:
    """Sample and grade. Draws depend only on seed, problem and sample, so all weights are compared on the same ones."""
    completions = sampler.sample(
        chunk.prompts,
        count=samples,
        params=params,
        policy_version=policy_version,
        stream=("benchmark", chunk.seed),
        finished=progress,
    )
    pairs = [(prompt.problem, group) for prompt, group in zip(chunk.prompts, completions, strict=True)]
    rewards = iter(
        grader.grade([GradeRequest(text=c.text, problem=problem) for problem, group in pairs for c in group])
    )
    lines = []
    for problem, group in pairs:
        verdicts = [within_tolerance(next(rewards), problem) for _ in group]
        lines.append(
            ProblemAnswers(
                weights=chunk.weights,
                seed=chunk.seed,
                benchmark=chunk.benchmark.name,
                problem=problem.id,
                reference=problem.answer,
                answers=[reward.answer for reward in verdicts],
                outcomes=[reward.outcome.value for reward in verdicts],
                tokens=[len(completion.token_ids) for completion in group],
                truncated=[completion.finish_reason is FinishReason.LENGTH for completion in group],
                text=group[0].text,
            )
        )
    return lines


def check_references(problems: Sequence[Problem], grader: Grader) -> list[str | None]:
    """Return for each problem why nothing can be graded against its answer, or None."""
    # An empty text is wrong whatever the reference is; if it gets no verdict, the reference is the reason.
    algebraic = [problem for problem in problems if plain_number(unwrap(problem.answer)) is None]
    rewards = grader.grade([GradeRequest(text="", problem=problem) for problem in algebraic])
    pairs = zip(algebraic, rewards, strict=True)
    reasons = {problem.id: reward.detail for problem, reward in pairs if not reward.outcome.is_graded}
    return [reasons.get(problem.id) or _tolerance_error(problem) for problem in problems]


def _tolerance_error(problem: Problem) -> str | None:
    tolerances, numbers = problem.meta.get("tolerance", ()), _numbers(unwrap(problem.answer))
    if numbers is None or len(tolerances) in (0, 1, len(numbers)):
        return None
    return f"it names {len(tolerances)} tolerances for the {len(numbers)} numbers of {problem.answer!r}"


def within_tolerance(reward: Reward, problem: Problem) -> Reward:
    """Return `reward`, made correct if its numbers, in any order, are within the problem's `tolerance`.

    Numbers are integers, decimals and fractions of integers, compared exactly.
    """
    if reward.outcome is not Outcome.INCORRECT or "tolerance" not in problem.meta or reward.answer is None:
        return reward
    given, wanted = _numbers(reward.answer), _numbers(unwrap(problem.answer))
    if given is None or wanted is None or len(given) != len(wanted):
        return reward
    tolerances = [Fraction(text) for text in problem.meta["tolerance"]]
    if len(tolerances) == 1:
        tolerances *= len(wanted)
    rest = sorted(given)
    # Matching each interval, in order of its upper end, with the least number in it finds a full match if there is one.
    for high, low in sorted((x + off, x - off) for x, off in zip(wanted, tolerances, strict=True)):
        inside = next((number for number in rest if low <= number <= high), None)
        if inside is None:
            return reward
        rest.remove(inside)
    return replace(reward, value=1.0, outcome=Outcome.CORRECT)


def _numbers(answer: str) -> list[Fraction] | None:
    """Return the number, or the numbers between commas, of an answer in normal form; None for other answers."""
    whole = _number(answer)
    numbers = [whole] if whole is not None else [_number(normalise(part)) for part in answer.split(",")]
    return None if None in numbers else [number for number in numbers if number is not None]


def _number(text: str) -> Fraction | None:
    plain = plain_number(text)
    if plain is not None:
        return Fraction(plain)
    parts = _FRACTION.fullmatch(text)
    return Fraction(f"{parts[1]}{parts[2] or parts[4]}/{parts[3] or parts[5]}") if parts else None
