"""Test the problems of reasoning-gym, its verifiers as they are used for rewards, and its curricula."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from popo_lite.errors import DataError, RecipeError
from popo_lite.grading import Grader
from popo_lite.grading.functions import load_functions
from popo_lite.grading.reasoning_gym import grade_reasoning_gym
from popo_lite.recipe import CurriculumRecipe, DatasetRecipe, RewardRecipe
from popo_lite.recipe_file import load_recipe
from popo_lite.tasks import open_tasks
from popo_lite.tasks.reasoning_gym import ALLOWED, REFUSED, ReasoningGymTask, ask
from popo_lite.tasks.reasoning_gym_process import is_held_out
from popo_lite.types import Outcome

pytest.importorskip("reasoning_gym")

SMALL = {"max_terms": 2, "max_digits": 1}
SEVERAL_RIGHT = {"jugs", "quantum_lock"}  # another problem's answer can solve this one, too
CODE = "__import__('os').getpid()"
JUNK = ["", "  ", "None", "0", "no", "1", "-1", "1/0", "nan", "inf", "1e999", "1e99999999", "[]", "{}", "[[0]]"]
JUNK += ['{"a": 1}', "x" * 100_000, "9" * 5000, "é∑𝔘🙂\u202e", "\x00", "(" * 200, "\\frac{1}{2}", "1,2,3", CODE]


def gym(names, curriculum=None, section="data", **tasks):
    part = DatasetRecipe(dataset=f"reasoning-gym:{names}", tasks=tasks)
    return ReasoningGymTask(part, section=section, curriculum=curriculum)


def as_request(problem):
    """Return what a grading process gets."""
    return json.loads(json.dumps({"id": problem.id, "answer": problem.answer, "meta": problem.meta}))


def equal(one, other):
    """Check whether two answers say the same."""
    try:
        return float(one) == float(other)
    except ValueError:
        return re.sub(r"[\W_]+", "", one).lower() == re.sub(r"[\W_]+", "", other).lower()


def test_every_task_is_allowed_or_refused():
    from reasoning_gym.factory import DATASETS

    assert ALLOWED | REFUSED.keys() == DATASETS.keys()
    assert not ALLOWED & REFUSED.keys()


RAN = []
sys.addaudithook(lambda event, args: RAN.append(args) if event == "compile" and "getpid" in str(args[0]) else None)


@pytest.fixture(scope="module")
def problems():
    """Four problems of every allowed task, as a grading process gets them."""
    made = ask(
        {"problems": [(name, {}, 1, place) for name in sorted(ALLOWED) for place in range(4)], "held_out": False}
    )
    found = {}
    for name, one in zip((name for name in sorted(ALLOWED) for _ in range(4)), made, strict=True):
        found.setdefault(name, []).append({**one, "meta": {"task": name, "settings": {}, "entry": one["entry"]}})
    return found


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_a_verifier_accepts_right_answers_alone(problems, name):
    RAN.clear()  # pytest has compiled other tests since the hook was set
    for number, problem in enumerate(problems[name]):
        right = problem["answer"].strip()
        assert grade_reasoning_gym(f"no\n<answer> {right}\n</answer>", problem) == 1
        others = [other["answer"].strip() for other in problems[name]]
        wrong = [other for other in others if not equal(other, right)] if name not in SEVERAL_RIGHT else []
        beside = [text for other in wrong for text in (f"{other} {right}", f"{right} {other}", f"{right}\n{other}")]
        junk = [text for text in JUNK if not equal(text, right)] if number < 2 else []
        for text in (*wrong, *beside, *junk, problem["question"], f"{problem['question']}\n{right}"):
            given = grade_reasoning_gym(text, problem)
            assert not given, (text[:80], right)
            assert given is None if not text.strip() else given == 0
    assert not RAN


def test_the_answer_is_taken_from_the_text():
    problem = as_request(gym("chain_sum", chain_sum=SMALL).train_problem(0, 0))
    right, wrong = problem["answer"], str(int(problem["answer"]) + 1)
    [function] = load_functions(RewardRecipe(functions=["reasoning_gym"]), thinking_open=False)
    for text, value in {
        right: 1,
        f" {right}\n": 1,
        f"It is {right}": 0,  # the verifier gives a part of the score
        f"<answer>{wrong}</answer> no, <answer>{right}</answer>": 1,
        f"<answer>{right}</answer> no, <answer>{wrong}</answer>": 0,
        f"{right}</think>{wrong}": 0,
        f"<answer>{wrong}</answer></think>{right}": 1,
        f"in `<answer>` tags. `<answer>{right}</answer>`": 1,
        f"<think>{right}</think> ": None,
        "<answer> </answer>": None,
    }.items():
        reward = function.grade(text, problem)
        assert (None if reward.outcome is Outcome.UNPARSED else reward.value) == value, text
    with pytest.raises(ValueError, match=r'is not from reasoning-gym; set data\.dataset = "reasoning-gym:TASK"'):
        grade_reasoning_gym("1", {"id": "x", "answer": "1", "meta": {}})


def test_a_grading_process_has_the_function():
    task = gym("rearc,chain_sum", rearc={"weight": 3})
    asked = [task.train_problem(0, index) for index in range(12)]
    assert {problem.meta["task"] for problem in asked} == {"rearc", "chain_sum"}
    with Grader(RewardRecipe.model_validate({"functions": "reasoning_gym", "workers": 1})) as grader:
        rewards = grader.grade([(problem.answer, problem) for problem in asked] + [("7 7", asked[0])])
    assert [reward.value for reward in rewards] == [1] * 12 + [0]


def test_problems_are_a_function_of_seed_index_and_level():
    two = {"chain_sum": {"weight": 3, "max_terms": 3}, "leg_counting": {}}
    task, again = gym("chain_sum,leg_counting", **two), gym("chain_sum,leg_counting", **two)
    indices = random.Random(0).sample(range(600), 40)
    asked = [task.train_problem(5, index) for index in indices]
    # In another process with another hash seed, too.
    code = f"""if True:
        from popo_lite.recipe import DatasetRecipe
        from popo_lite.tasks import ReasoningGymTask
        part = DatasetRecipe(dataset="reasoning-gym:chain_sum,leg_counting", tasks={two})
        task = ReasoningGymTask(part, section="data")
        print([task.train_problem(5, index).id for index in {indices}])"""
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str([problem.id for problem in asked])
    assert [again.train_problem(5, index) for index in reversed(indices)] == asked[::-1]
    assert [task.train_problem(6, index) for index in indices] != asked
    drawn = [task.train_problem(5, index).meta["task"] for index in range(600)]
    assert drawn.count("chain_sum") == pytest.approx(450, abs=50)


def test_held_out_problems_are_never_trained_on():
    curriculum = CurriculumRecipe(enabled=True, levels=({}, {"chain_sum": {"max_terms": 3}}))
    task = gym("chain_sum", curriculum, chain_sum=SMALL)
    held_out = task.held_out(60)
    trained = {task.train_problem(seed, i, level).id for seed in range(2) for level in (0, 1) for i in range(256)}
    assert len({problem.id for problem in held_out}) == 60
    assert trained.isdisjoint(problem.id for problem in held_out)
    assert all(is_held_out(f" {problem.question}\n") for problem in held_out)
    assert task.held_out(20)[:10] == held_out[:10]
    assert len(re.findall(r"\d", held_out[0].question)) == 2  # of the first level
    with pytest.raises(DataError, match=r"only \d+ held-out problems were found, 100 are asked for.*\n.*at most \d+"):
        gym("chain_sum", chain_sum=SMALL).held_out(100)


def test_prompts_that_are_too_long_are_replaced():
    task = gym("chain_sum")
    before = [task.train_problem(0, index) for index in range(64)]
    assert task.drop_training(lambda problem: "is too long" if len(problem.question) > 80 else None) == []
    after = [task.train_problem(0, index) for index in range(64)]
    assert max(len(problem.question) for problem in after) <= 80 < max(len(problem.question) for problem in before)
    assert all(a == b for a, b in zip(before, after, strict=True) if len(b.question) > 80 or a in after)
    longest = task.longest_candidates()
    assert longest == sorted(longest, key=lambda problem: -len(problem.question))
    task.drop_training(lambda _: "is too long")
    with pytest.raises(DataError, match=r"20 problems in a row do not fit"):
        task.train_problem(0, 0)


def test_levels_come_from_the_curricula():
    task = gym("chain_sum,caesar_cipher", CurriculumRecipe(enabled=True), chain_sum={"max_digits": 1})
    assert task.levels == 11  # chain_sum's; the last ones of caesar_cipher are refused by the task itself
    chains = [[p for i in range(64) if (p := task.train_problem(0, i, n)).meta["task"] == "chain_sum"] for n in (0, 10)]
    assert [max(len(re.findall(r"\d+", problem.question)) for problem in level) for level in chains] == [2, 12]
    assert all(problem.meta["settings"]["max_digits"] == 1 for level in chains for problem in level)


NEEDS_LEVELS = "[data.curriculum]\nenabled = true\n"
GCD = 'dataset = "reasoning-gym:gcd"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    {
        'dataset = "reasoning-gym:chain_smu"': 'there is no task "chain_smu" in .*did you mean "chain_sum"',
        'dataset = "reasoning-gym:acre"': 'the task "acre" is refused: its code is under the GPL',
        'dataset = "reasoning-gym:gcd"\ntasks = { lcm = {} }': r'data\.tasks: "lcm" is not one of the tasks of',
        f"{GCD}tasks = {{ gcd = {{ max_valu = 9 }} }}": r"data\.tasks\.gcd: the task has no setting max_valu = 9.*"
        r"did you mean max_value\?",
        f"{GCD}tasks = {{ gcd = {{ max_value = 0 }} }}": r'"max_value": 0\} is refused by reasoning-gym',
        f"{GCD}tasks = {{ gcd = {{ weight = 0 }} }}": "weight = 0 is not a number above 0",
        f"{GCD}{NEEDS_LEVELS}levels = [{{}}]": "needs two levels or more, and there is 1",
        f"{GCD}{NEEDS_LEVELS}levels = [{{}}, {{ gcd = {{ x = 1 }} }}]": r"levels\[1\]\.gcd: the task has no .* x = 1",
    }.items(),
)
def test_an_error_names_key_and_value(tmp_path, text, message):
    (tmp_path / "recipe.toml").write_text(f"[data]\n{text}\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"(?s){message}"):
        open_tasks(load_recipe(tmp_path / "recipe.toml"))


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "tasks = { gcd = {} }": r'data\.tasks .*is for tasks of reasoning-gym, dataset = "reasoning-gym:NAME"',
        'dataset = "reasoning-gym:gcd"\nlimit = 3': r"data\.limit = 3: describes rows",
        NEEDS_LEVELS: r'data\.curriculum\.enabled = true: data\.dataset = "arithmetic" has no levels',
        f"{NEEDS_LEVELS}low = 0.7": r"data\.curriculum\.low = 0\.7: must be below data\.curriculum\.high = 0\.7",
        'dataset = "x.csv"\ncurriculum = { column = "level" }': r"set that too",
        f'dataset = "x.csv"\n{NEEDS_LEVELS}levels = [{{ gcd = {{}} }}]': r"levels .*or set data\.curriculum\.column",
        f'{GCD}{NEEDS_LEVELS}column = "x"': r"column .*these problems are generated",
    }.items(),
)
def test_a_recipe_that_cannot_be_is_refused(tmp_path, text, message):
    (tmp_path / "recipe.toml").write_text(f"[data]\n{text}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "recipe.toml")


def test_a_generator_that_fails_is_named():
    # Every question has the same few texts, so that none of them may be held out.
    with pytest.raises(DataError, match=r"(?s)data\.tasks\.count_bits = .*no problem can be made"):
        task = gym("count_bits", count_bits={"min_n": 1, "max_n": 1})
        task.held_out(1)
        task.train_problem(0, 0)
    # The process is started again after it ended.
    from popo_lite.tasks import reasoning_gym

    process, _ = reasoning_gym._process()
    process.kill()
    process.wait()
    with pytest.raises(DataError, match=r"the process that generates problems ended with exit code -9"):
        gym("gcd")
    assert gym("gcd").levels == 1


RUN = """
import json, os, signal
from popo_lite.tasks import reasoning_gym

process, _ = reasoning_gym._process()
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda *_: None)
    os.killpg(0, number)
print(process.pid, len(reasoning_gym.ask({"open": ["gcd", {}], "climb": False})["levels"]), flush=True)
jobs = [["gcd", {}, seed, 0] for seed in range(1_000_000)]
process.stdin.write(json.dumps({"problems": jobs, "held_out": False}) + "\\n")
process.stdin.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="there are no process groups here")
def test_signals_to_a_whole_group_do_not_reach_the_generating_process_and_it_ends_with_the_run():
    """As torchrun sends them; and its SIGKILL may come in the middle of a request."""
    done = subprocess.run([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert done.returncode == -signal.SIGKILL
    pid, levels = map(int, done.stdout.split())
    assert levels == 1
    until = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.1)
