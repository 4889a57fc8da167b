"""Benchmarks: what is sampled in which order, how an answer becomes a verdict, and what the verdicts come to."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from popo_lite.errors import DataError, GradingError, ModelError
from popo_lite.evaluation import pass_at_k
from popo_lite.grading import Grader, GradeRequest
from popo_lite.grading.math import normalise, plain_number, unwrap
from popo_lite.samplers import Sampler, SamplingParams
from popo_lite.tasks.rendering import Renderer
from popo_lite.tools.benchmarks.datasets import BENCHMARKS
from popo_lite.tools.benchmarks.estimates import bootstrap_interval, majority_at_k
from popo_lite.types import (
    BenchmarkResult,
    BenchmarkScore,
    FinishReason,
    Outcome,
    Problem,
    ProblemAnswers,
    Prompt,
    Reward,
)

AVERAGE = "average"
CHUNK_BATCHES = 4
"""A chunk has about this many batches of sequences: enough to keep an engine busy, few to lose when killed."""

JUDGED_PROBLEMS = 20
"""The share of ungraded answers is taken of at least this many problems: one whose answers all hang breaks nothing."""

_SHOWN_UNGRADED = 3
_NO_VERDICT = [outcome.value for outcome in Outcome if not outcome.is_graded]
_FRACTION = re.compile(r"([+-]?)(?:\\[dt]?frac\{(\d+)\}\{(0*[1-9]\d*)\}|(\d+)/(0*[1-9]\d*))")


@dataclass(frozen=True, kw_only=True)
class PreparedBenchmark:
    """Prompts of one benchmark, and how long answers to them may get in the model's context, in tokens.

    `repeats` maps problems that ask what an earlier one asks to that one, by their ids.
    """

    name: str
    prompts: tuple[Prompt, ...]
    skipped: int
    repeats: Mapping[str, str]
    max_completion_length: int
    digest: str

    @property
    def longest_prompt_tokens(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def contents(self) -> dict[str, Any]:
        """What it consists of, as plain data."""
        return {
            "rows": len(self.prompts) + self.skipped,
            "published": BENCHMARKS[self.name].problems,
            "skipped": self.skipped,
            "repeats": dict(self.repeats),
        }


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Problems of one benchmark that are sampled together, under one set of weights and one seed."""

    weights: str
    seed: int
    benchmark: PreparedBenchmark
    prompts: tuple[Prompt, ...]

    @property
    def keys(self) -> list[tuple[str, int, str, str]]:
        """(weights, seed, benchmark, problem id) of its lines in the file of answers, in order."""
        return [(self.weights, self.seed, self.benchmark.name, prompt.problem.id) for prompt in self.prompts]


def prepare(
    name: str,
    problems: Sequence[Problem],
    renderer: Renderer,
    *,
    max_completion_length: int,
    context_tokens: int,
    skip_overlong: bool,
) -> PreparedBenchmark:
    """Render `problems`; answers end where the longest of their prompts leaves no more of the context.

    Raises DataError for prompts longer than the renderer's `max_prompt_length`, unless `skip_overlong`, and ModelError
    where the context has no room for an answer.
    """
    prompts = [Prompt(problem=problem, token_ids=renderer.token_ids(problem)) for problem in problems]
    limit = renderer.max_prompt_length
    fitting = tuple(prompt for prompt in prompts if len(prompt.token_ids) <= limit)
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    if not fitting or (len(fitting) < len(prompts) and not skip_overlong):
        raise DataError(
            f"{len(prompts) - len(fitting)} of {len(prompts)} prompts are longer than {limit} tokens, the longest, "
            f"{longest.problem.id}, has {len(longest.token_ids)}",
            where=name,
            next_step=f"--max-prompt-tokens {len(longest.token_ids)}, or leave them out with --skip-overlong",
        )
    room = context_tokens - max(len(prompt.token_ids) for prompt in fitting)
    if room < 1:
        raise ModelError(
            f"the longest prompt leaves no room for an answer in the model's context of {context_tokens} tokens",
            where=name,
            next_step=f"--max-prompt-tokens below {context_tokens}, leaving longer ones out with --skip-overlong",
        )
    first: dict[tuple[int, ...], str] = {}
    repeats = {
        prompt.problem.id: earlier
        for prompt in prompts
        if (earlier := first.setdefault(prompt.token_ids, prompt.problem.id)) != prompt.problem.id
    }
    asked = [
        [prompt.problem.id, prompt.token_ids, prompt.problem.answer, dict(prompt.problem.meta)] for prompt in prompts
    ]
    return PreparedBenchmark(
        name=name,
        prompts=fitting,
        skipped=len(prompts) - len(fitting),
        repeats=repeats,
        max_completion_length=min(max_completion_length, room),
        digest=hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
    )


def chunks_of(
    benchmarks: Sequence[PreparedBenchmark],
    *,
    weights: Sequence[str],
    seeds: Sequence[int],
    samples: int,
    batch_size: int,
) -> Iterator[Chunk]:
    """All that is to be sampled, in the order in which it is."""
    size = max(1, CHUNK_BATCHES * batch_size // samples)
    for name in weights:
        for seed in seeds:
            for benchmark in benchmarks:
                for start in range(0, len(benchmark.prompts), size):
                    yield Chunk(
                        weights=name, seed=seed, benchmark=benchmark, prompts=benchmark.prompts[start : start + size]
                    )


def sample_chunk(
    chunk: Chunk,
    *,
    sampler: Sampler,
    grader: Grader,
    policy_version: int,
    samples: int,
    temperature: float,
    top_p: float,
    progress: Callable[[int], None],
) -> list[ProblemAnswers]:
    """Sample and grade. Draws depend on seed, problem and sample alone, so all weights are compared on the same."""
    groups = sampler.sample(
        chunk.prompts,
        count=samples,
        params=SamplingParams(
            temperature=temperature, top_p=top_p, max_completion_length=chunk.benchmark.max_completion_length
        ),
        policy_version=policy_version,
        stream=("benchmark", chunk.seed),
        finished=progress,
    )
    rewards = iter(
        grader.grade(
            [
                GradeRequest(text=completion.text, problem=prompt.problem)
                for prompt, group in zip(chunk.prompts, groups, strict=True)
                for completion in group
            ]
        )
    )
    lines = []
    for prompt, group in zip(chunk.prompts, groups, strict=True):
        verdicts = [within_tolerance(next(rewards), prompt.problem) for _ in group]
        lines.append(
            ProblemAnswers(
                weights=chunk.weights,
                seed=chunk.seed,
                benchmark=chunk.benchmark.name,
                problem=prompt.problem.id,
                reference=prompt.problem.answer,
                answers=[reward.answer for reward in verdicts],
                outcomes=[reward.outcome.value for reward in verdicts],
                tokens=[len(completion.token_ids) for completion in group],
                truncated=[completion.finish_reason is FinishReason.LENGTH for completion in group],
                text=group[0].text,
            )
        )
    return lines


def reference_faults(problems: Sequence[Problem], grader: Grader) -> list[str | None]:
    """Why each problem's answer cannot be graded against, None where it can.

    The grader is given an empty text, which is wrong whatever the reference: no verdict on it is the reference's fault.
    """
    algebraic = [problem for problem in problems if plain_number(unwrap(problem.answer)) is None]
    rewards = grader.grade([GradeRequest(text="", problem=problem) for problem in algebraic])
    faults = {
        problem.id: reward.detail
        for problem, reward in zip(algebraic, rewards, strict=True)
        if not reward.outcome.is_graded
    }
    return [faults.get(problem.id) or _tolerance_fault(problem) for problem in problems]


def _tolerance_fault(problem: Problem) -> str | None:
    tolerances, numbers = problem.meta.get("tolerance", ()), _numbers(unwrap(problem.answer))
    if numbers is None or len(tolerances) in (0, 1, len(numbers)):
        return None
    return f"it names {len(tolerances)} tolerances for the {len(numbers)} numbers of {problem.answer!r}"


def within_tolerance(reward: Reward, problem: Problem) -> Reward:
    """`reward`, made correct where its numbers, in any order, are no further off than the problem's `tolerance`.

    Numbers are integers, decimals and fractions of integers, compared exactly.
    """
    if reward.outcome is not Outcome.INCORRECT or "tolerance" not in problem.meta or reward.answer is None:
        return reward
    found, wanted = _numbers(reward.answer), _numbers(unwrap(problem.answer))
    if found is None or wanted is None or len(found) != len(wanted):
        return reward
    tolerances = [Fraction(text) for text in problem.meta["tolerance"]]
    if len(tolerances) == 1:
        tolerances *= len(wanted)
    rest = sorted(found)
    # The range that ends first takes the least number inside it: if all can be served, so they are.
    for high, low in sorted((x + off, x - off) for x, off in zip(wanted, tolerances, strict=True)):
        inside = next((number for number in rest if low <= number <= high), None)
        if inside is None:
            return reward
        rest.remove(inside)
    return replace(reward, value=1.0, outcome=Outcome.CORRECT)


def _numbers(answer: str) -> list[Fraction] | None:
    """The numbers that `answer`, in normal form, consists of: one, or several between commas; None for others."""
    one = _number(answer)
    found = [one] if one is not None else [_number(normalise(part)) for part in answer.split(",")]
    numbers = [number for number in found if number is not None]
    return numbers if len(numbers) == len(found) else None


def _number(text: str) -> Fraction | None:
    plain = plain_number(text)
    if plain is not None:
        return Fraction(plain)
    parts = _FRACTION.fullmatch(text)
    return Fraction(f"{parts[1]}{parts[2] or parts[4]}/{parts[3] or parts[5]}") if parts else None


def summarise(lines: Sequence[ProblemAnswers], k: int) -> list[BenchmarkResult]:
    """One result for each of the weights and benchmarks, in the order of `lines`, and after several their average.

    `lines` hold the same seeds for each. The average counts every benchmark alike, however many problems it has.
    """
    results = []
    for weights in dict.fromkeys(line.weights for line in lines):
        names = list(dict.fromkeys(line.benchmark for line in lines if line.weights == weights))
        seeds = list(dict.fromkeys(line.seed for line in lines if line.weights == weights))
        found = {
            (name, seed): [line for line in lines if (line.weights, line.benchmark, line.seed) == (weights, name, seed)]
            for name in names
            for seed in seeds
        }
        parts = [(name, [name]) for name in names] + ([(AVERAGE, names)] if len(names) > 1 else [])
        for title, members in parts:
            pooled = [_pool([found[name, seed] for seed in seeds]) for name in members]
            results.append(
                BenchmarkResult(
                    weights=weights,
                    benchmark=title,
                    problems=sum(map(len, pooled)),
                    pooled=_score(pooled, k),
                    by_seed={seed: _score([found[name, seed] for name in members], k) for seed in seeds},
                )
            )
    return results


def refuse_ungradable(lines: Sequence[ProblemAnswers], *, planned: int, limit: float) -> None:
    """Raise GradingError where more than the share `limit` of the answers in `lines` is no verdict.

    `lines` are those that there are so far of one benchmark under one set of weights; there will be `planned`. The
    share is taken of at least `JUDGED_PROBLEMS` lines, or of all planned ones where these are fewer.
    """
    shares = [_ungraded_ratio(line) for line in lines]
    share = sum(shares) / max(len(lines), min(JUDGED_PROBLEMS, planned))
    if share <= limit:
        return
    worst = sorted(lines, key=_ungraded_ratio, reverse=True)[:_SHOWN_UNGRADED]
    shown = [
        f"{line.problem} ({', '.join(f'{line.outcomes.count(one)} {one}' for one in _NO_VERDICT)})" for line in worst
    ]
    raise GradingError(
        f"{share:.0%} of the answers to {lines[0].benchmark} could not be graded, more than the {limit:.0%} "
        f"(reward.max_ungraded_ratio) at which figures still mean something; most to {', '.join(shown)}",
        where=f"weights {lines[0].weights}",
        next_step="the last problems were not kept: the same command samples and grades them again; for timeouts, give "
        "it when the machine has less else to do",
    )


def _ungraded_ratio(line: ProblemAnswers) -> float:
    return sum(map(line.outcomes.count, _NO_VERDICT)) / len(line.outcomes)


def _pool(seeds: Sequence[Sequence[ProblemAnswers]]) -> list[ProblemAnswers]:
    """Each problem with the samples of all seeds, one seed behind another."""
    return [
        replace(
            lines[0],
            answers=[one for line in lines for one in line.answers],
            outcomes=[one for line in lines for one in line.outcomes],
            tokens=[one for line in lines for one in line.tokens],
            truncated=[one for line in lines for one in line.truncated],
        )
        for lines in zip(*seeds, strict=True)
    ]


def _score(groups: Sequence[Sequence[ProblemAnswers]], k: int) -> BenchmarkScore:
    """Figures of the problems of each group, averaged over problems and then over groups."""
    samples = len(groups[0][0].answers)

    def each(figure: Callable[[ProblemAnswers], float]) -> list[list[float]]:
        return [[figure(line) for line in group] for group in groups]

    def mean(values: Sequence[Sequence[float]]) -> float:
        return statistics.fmean(statistics.fmean(group) for group in values)

    ks = sorted({k, *(2**power for power in range(samples.bit_length()))})
    averages = each(lambda line: statistics.fmean(line.right))
    passes = {n: each(lambda line, n=n: pass_at_k(samples, sum(line.right), n)) for n in ks}  # type: ignore[misc]
    votes = {
        n: each(lambda line, n=n: majority_at_k(line.answers, line.right, n))  # type: ignore[misc]
        for n in sorted({k, samples})
    }
    return BenchmarkScore(
        samples_per_problem=samples,
        average=mean(averages),
        pass_at_k={n: mean(values) for n, values in passes.items()},
        majority_at_k={n: mean(values) for n, values in votes.items()},
        truncated_ratio=mean(each(lambda line: statistics.fmean(line.truncated))),
        ungraded_ratio=mean(each(_ungraded_ratio)),
        completion_tokens_mean=mean(each(lambda line: statistics.fmean(line.tokens))),
        intervals={
            "average": bootstrap_interval(averages),
            f"pass@{k}": bootstrap_interval(passes[k]),
            f"majority@{k}": bootstrap_interval(votes[k]),
        },
    )
