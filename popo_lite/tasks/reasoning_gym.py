"""Make problems with the generators of reasoning-gym, in a process of their own (`reasoning_gym_process`).

What a question says alone decides whether it is held out, so no seed, setting or level can bring it into training.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import IO, Any, Literal

from popo_lite.errors import DataError, nearest
from popo_lite.installing import install_extra
from popo_lite.recipe import CurriculumRecipe, DatasetRecipe
from popo_lite.seeding import stream_seed
from popo_lite.types import Problem

PREFIX = "reasoning-gym:"
BLOCK = 64
"""Problems generated at once."""
CACHED_BLOCKS = 8
TURNS = 20
"""With `data.overlong_prompts = "skip"`: problems tried in place of one that is too long."""
CANDIDATES = 128
"""Problems of each level whose length is checked before the run."""

_ALLOWED = """ab advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf binary_alternation
    bitwise_arithmetic caesar_cipher calendar_arithmetic chain_sum circuit_logic color_cube_rotation count_bits
    count_primes course_schedule cryptarithm decimal_arithmetic decimal_chain_sum dice emoji_mystery
    family_relationships figlet_font gcd group_anagrams jugs kakurasu knights_knaves largest_island lcm leg_counting
    letter_counting list_functions mahjong_puzzle manipulate_matrix maze mini_sudoku modulo_grid needle_haystack
    number_filtering number_format number_sequence number_sorting palindrome_generation palindrome_partitioning
    path_star pool_matrix power_function products quantum_lock rearc rectangle_count rotate_matrix rotten_oranges
    self_reference sentence_reordering shortest_path simple_equations simple_geometry string_manipulation
    string_splitting string_synthesis sudoku survo syllogism tower_of_hanoi tsumego word_sequence_reversal
    zebra_puzzles"""
ALLOWED = frozenset(_ALLOWED.split())
"""Tasks whose verifier gives 1 to right answers alone, and never raises or runs an answer."""

_REFUSED = {
    "its verifier runs the answer as Python code": "binary_matrix countdown intermediate_integration n_queens puzzle24 "
    "simple_integration spiral_matrix string_insertion",
    "its verifier accepts a right answer with wrong ones beside it": "fraction_simplification letter_jumble "
    "polynomial_equations sokoban spell_backward time_intervals word_sorting",
    "its verifier accepts any text": "game_of_life_halting",
    "its verifier accepts nan": "complex_arithmetic",
    "its verifier accepts 0 for small probabilities, and hangs on 1e99999999": "coin_flip",
    "its verifier reads the first number of the answer and nothing else": "gsm_symbolic",
    "its verifier raises an error for some wrong answers": "game_of_life prime_factorization",
    "its problems have no reference answer": "boxnet graph_color propositional_logic rubiks_cube rush_hour",
    "its problems depend on the hash seed of the Python process": "codeio isomorphic_strings knight_swap "
    "polynomial_multiplication ransom_note word_ladder",
    "it takes seconds for a problem": "futoshiki",
    "its code is under the GPL": "acre",
    "name its tasks themselves": "composite",
}
REFUSED = {name: reason for reason, names in _REFUSED.items() for name in names.split()}
"""All other tasks -> why they are refused."""

Settings = dict[str, Any]


class ReasoningGymTask:
    """Problems of one or several tasks, mixed by weight. `levels` is the number of difficulties of `curriculum`.

    `part` stands in `section` of the recipe. A problem's `meta` holds its task, settings and entry, as the verifier
    needs them. Raises DataError for unknown or refused tasks, and for settings that a task does not take.
    """

    def __init__(
        self, part: DatasetRecipe, *, section: Literal["data", "eval"], curriculum: CurriculumRecipe | None = None
    ) -> None:
        self.name, self._section = str(part.dataset), section
        tables: list[tuple[str, Mapping[str, Mapping[str, Any]]]] = [(f"{section}.tasks", part.tasks)]
        if curriculum is not None:
            tables += [(f"data.curriculum.levels[{n}]", table) for n, table in enumerate(curriculum.levels)]
        names = [name.strip() for name in self.name.removeprefix(PREFIX).split(",")]
        for name in names:
            _check_name(name, f'{section}.dataset "{self.name}"')
        for where, table in tables:
            if unknown := next((name for name in table if name not in names), None):
                likely = nearest(unknown, names)
                what = f'"{unknown}" is not one of the tasks of {section}.dataset "{self.name}"'
                next_step = f'did you mean "{likely}"?' if likely else f"name it in {section}.dataset, or leave it out"
                raise DataError(what, where=where, next_step=next_step)
        self._weights = {name: _weight(part.tasks.get(name, {}), f"{section}.tasks.{name}") for name in names}
        own = {name: _without_weight(part.tasks.get(name, {})) for name in names}
        if curriculum is not None and curriculum.levels:
            merged = [
                {name: own[name] | _without_weight(level.get(name, {})) for name in names} for _, level in tables[1:]
            ]
            for number, level in enumerate(merged):
                for name, settings in level.items():
                    _ladder(name, settings, f"data.curriculum.levels[{number}].{name}", climb=False)
            self._levels = merged
        else:
            climb = curriculum is not None
            ladders = {name: _ladder(name, own[name], f"{section}.tasks.{name}", climb=climb) for name in names}
            top = max(map(len, ladders.values()))
            # A task with fewer levels than another stays at its hardest.
            self._levels = [
                {name: ladder[min(n, len(ladder) - 1)] for name, ladder in ladders.items()} for n in range(top)
            ]
        if curriculum is not None and len(self._levels) < 2:
            what = f"data.curriculum needs two levels or more, and there is {len(self._levels)}"
            next_step = "declare them in data.curriculum.levels"
            raise DataError(what, where=f'{section}.dataset "{self.name}"', next_step=next_step)
        self.levels = len(self._levels)
        self._block = lru_cache(maxsize=CACHED_BLOCKS)(self._make_block)
        self.notices: list[str] = []
        self._unwanted: Callable[[Problem], str | None] = lambda _: None

    def train_problem(self, seed: int, index: int, level: int = 0) -> Problem:
        """Return the `index`-th training problem of `seed` at `level`, one that is not held out."""
        number, place = divmod(index, BLOCK)
        for turn in range(TURNS):
            problem = self._block("train", seed, number, level, turn)[place]
            if not self._unwanted(problem):
                return problem
        what = f"{TURNS} problems in a row do not fit into prompts of rollout.max_prompt_length"
        raise DataError(what, where=f"{self._section}.dataset", next_step="raise rollout.max_prompt_length")

    def held_out(self, count: int) -> list[Problem]:
        """Return `count` distinct held-out problems, of all levels in turn. Raises DataError for too many."""
        chosen: list[Problem] = []
        for level in range(self.levels):
            share, known = len(range(level, count, self.levels)), {problem.id for problem in chosen}
            found: dict[str, Problem] = {}
            for number in range(2 + 20 * share // BLOCK):
                if len(found) >= share:
                    break
                block = self._block("held-out", 0, number, level, 0)
                found |= {problem.id: problem for problem in block if problem.id not in known | found.keys()}
            if len(found) < share:
                at_level = f" at level {level}" if self.levels > 1 else ""
                what = f"only {len(found)} held-out problems were found{at_level}, {share} are asked for"
                most = f"set eval.problems to at most {len(found) * self.levels}, or widen {self._section}.tasks"
                raise DataError(what, where=f'{self._section}.dataset "{self.name}"', next_step=most)
            chosen += itertools.islice(found.values(), share)
        return chosen

    def training(self) -> list[Problem]:
        """Return an empty list: problems are made without end, and their verifiers can read them."""
        return []

    def drop_training(self, reason: Callable[[Problem], str | None]) -> list[str]:
        """Replace problems that have a `reason` by others from now on. Returns an empty list."""
        self._unwanted = reason
        return []

    def longest_candidates(self) -> list[Problem]:
        """Return problems of every level, those with the most bytes of text first. Longer ones may come later."""
        sample = (self.train_problem(0, index, level) for level in range(self.levels) for index in range(CANDIDATES))
        return sorted(sample, key=lambda problem: -len(problem.question.encode()))

    def figures(self, texts: Sequence[str]) -> Mapping[str, float]:  # noqa: ARG002 - as ArithmeticTask has it
        """Return nothing: no figure describes answers to all tasks."""
        return {}

    def _make_block(self, kind: str, seed: int, number: int, level: int, turn: int) -> list[Problem]:
        """Generate problems `number * BLOCK` and following. `kind` is "train" or "held-out"."""
        jobs: list[tuple[str, Settings, int, int]] = []
        for place in range(BLOCK):
            name = self._draw_task(kind, seed, number * BLOCK + place)
            block_seed = stream_seed("reasoning-gym/block", kind, name, seed, number, level, turn) % 2**31
            jobs.append((name, self._levels[level][name], block_seed, place))
        answers = ask({"problems": jobs, "held_out": kind == "held-out"})
        problems = []
        for (name, settings, _, _), answer in zip(jobs, answers, strict=True):
            if "error" in answer:
                next_step = f"leave the task out of {self._section}.dataset, or change its settings"
                where = f"{self._section}.tasks.{name} = {json.dumps(settings)}"
                raise DataError(f"no problem can be made: {answer['error']}", where=where, next_step=next_step)
            question = answer["question"]
            problems.append(
                Problem(
                    id=f"{name}/{stream_seed('reasoning-gym/id', question):016x}",
                    messages=({"role": "user", "content": question},),
                    answer=answer["answer"],
                    meta={"task": name, "settings": settings, "entry": answer["entry"]},
                )
            )
        return problems

    def _draw_task(self, kind: str, seed: int, index: int) -> str:
        """Return a task, with a probability proportional to its weight."""
        point = stream_seed("reasoning-gym/task", kind, seed, index) / 2**63 * sum(self._weights.values())
        ends = itertools.accumulate(self._weights.values())
        return next(name for name, end in zip(self._weights, ends, strict=True) if point < end)


def _check_name(name: str, where: str) -> None:
    if name in ALLOWED:
        return
    if name in REFUSED:
        next_step = "name another task; docs/data.md lists those that are refused"
        raise DataError(f'the task "{name}" is refused: {REFUSED[name]}', where=where, next_step=next_step)
    likely = nearest(name, [*ALLOWED, *REFUSED])
    next_step = f'did you mean "{likely}"?' if likely else f"name one of {', '.join(sorted(ALLOWED))}"
    raise DataError(f'there is no task "{name}" in reasoning-gym', where=where, next_step=next_step)


def _weight(settings: Mapping[str, Any], where: str) -> float:
    weight = settings.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
        raise DataError(f"weight = {weight!r} is not a number above 0", where=where, next_step="correct it")
    return float(weight)


def _without_weight(settings: Mapping[str, Any]) -> Settings:
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in settings.items() if key != "weight"
    }


def _ladder(name: str, settings: Settings, where: str, *, climb: bool) -> list[Settings]:
    """Return the settings of each level of reasoning-gym's curriculum, or `settings` alone if not to `climb`."""
    reply: dict[str, Any] = ask({"open": [name, settings], "climb": climb})
    if "levels" in reply:
        return list(reply["levels"])
    if "unknown" in reply:
        key, known = reply["unknown"], reply["known"]
        likely = nearest(key, known)
        next_step = f"did you mean {likely}?" if likely else f"it has {', '.join([*known, 'weight'])}"
        what = f"the task has no setting {key} = {json.dumps(settings[key])}"
        raise DataError(what, where=where, next_step=next_step)
    what = f"{json.dumps(settings)} is refused by reasoning-gym: {reply['error']}"
    raise DataError(what, where=where, next_step="correct these settings")


# --------------------------------------------------------------------------- the generating process


@cache
def _process() -> tuple[subprocess.Popen[str], IO[bytes]]:
    """Start the generating process, which ends with this one."""
    if importlib.util.find_spec("reasoning_gym") is None:
        next_step = install_extra("tasks")
        raise DataError("the package reasoning-gym is not installed", where="data.dataset", next_step=next_step)
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process is
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("reasoning_gym_process.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        encoding="utf-8",
        # Some generators iterate over sets of text, whose order the hash seed decides.
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "MPLBACKEND": "agg"},
        # Signals are for the run, which finishes its step; a terminal and torchrun send them to the whole group.
        start_new_session=True,
    )
    assert process.stdin is not None  # noqa: S101
    here = str(Path.cwd())
    first = {"path": [entry or here for entry in sys.path], "parent": os.getpid()}
    print(json.dumps(first), file=process.stdin, flush=True)
    return process, errors


def ask(request: Mapping[str, Any]) -> Any:
    """Return the generating process's reply. Raises DataError if it ends instead, as it does if a generator hangs."""
    process, errors = _process()
    assert process.stdin is not None  # noqa: S101
    assert process.stdout is not None  # noqa: S101
    line = ""
    try:
        print(json.dumps(request), file=process.stdin, flush=True)
        line = process.stdout.readline()
    except BrokenPipeError:
        pass
    if line:
        return json.loads(line)
    process.wait()
    _process.cache_clear()
    errors.seek(0)
    tail = errors.read()[-2000:].decode(errors="replace").strip()
    what = f"the process that generates problems ended with exit code {process.returncode}; it wrote:\n{tail}"
    next_step = "leave out the task that it was at, or change its settings"
    raise DataError(what, where="data.dataset, eval.dataset", next_step=next_step)
