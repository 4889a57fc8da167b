"""Several reward functions as one reward, functions in TRL's form, and their trial before a run starts."""

import json
import time
from pathlib import Path

import pytest

from popo_lite.callbacks import Callback
from popo_lite.errors import UserInputError
from popo_lite.grading import Grader
from popo_lite.grading.functions import combine, load_functions, try_functions
from popo_lite.recipe import RewardRecipe
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder
from popo_lite.trainer import Trainer
from popo_lite.types import Outcome, Problem, Reward

EXAMPLES = Path(__file__).parents[2] / "examples"


def problem_of(answer: str = "42", name: str = "row-7", **meta: object) -> Problem:
    return Problem(id=name, messages=({"role": "user", "content": "How many?"},), answer=answer, meta=meta)


def part(value: float | None, outcome: Outcome | None = None) -> Reward | None:
    outcome = outcome or (Outcome.CORRECT if (value or 0) > 0.5 else Outcome.INCORRECT)
    return None if value is None else Reward(value=value, outcome=outcome)


# --- combination ---


@pytest.mark.parametrize(
    ("weights", "values", "settings", "value", "positive"),
    [
        ((1, 1), (1.0, 0.5), {}, 0.75, True),
        ((3, 1), (0.0, 1.0), {}, 0.25, False),
        ((1, 1), (1.0, 0.0), {}, 0.5, False),  # not above the threshold
        ((1, 1), (1.0, 0.0), {"threshold": 0.4}, 0.5, True),
        ((1, -1), (1.0, 1.0), {}, 0.5, False),  # a penalty
        ((1, -1), (1.0, 0.25), {}, 0.875, True),
        ((1, 0), (1.0, 0.0), {}, 1.0, True),  # only measured
        ((2, 1), (0.8, None), {}, 0.8, True),  # the second does not apply
        ((2, 1), (None, 1.0), {}, 1.0, False),  # right by the form alone
        ((2, -1), (0.8, None), {}, 0.8, True),
        ((1, 1), (None, None), {}, 0.0, False),
        ((1, 9), (0.0, 1.0), {"positive_if": ["f0"]}, 0.9, False),
        ((9, 1), (1.0, 0.4), {"positive_if": ["f0", "f1"]}, 0.94, False),
        ((1, 9), (1.0, 0.0), {"positive_if": ["f0"]}, 0.1, True),
        ((1, 1), (1.0, None), {"positive_if": ["f0", "f1"]}, 1.0, False),  # not known to pass
    ],
)
def test_a_reward_is_the_mean_by_weight(weights, values, settings, value, positive):
    functions = [{"name": "exact", "label": f"f{i}", "weight": float(weight)} for i, weight in enumerate(weights)]
    recipe = RewardRecipe(functions=functions, **settings)
    found = combine({f"f{i}": part(one) for i, one in enumerate(values)}, recipe)
    assert found.value == pytest.approx(value)
    assert found.positive is positive
    unparsed = values[0] is None and not positive
    assert found.outcome is (Outcome.CORRECT if positive else Outcome.UNPARSED if unparsed else Outcome.INCORRECT)
    assert found.parts == {f"f{i}": one for i, one in enumerate(values) if one is not None}


@pytest.mark.parametrize("settings", [{}, {"positive_if": ["python_tests"]}, {"threshold": 0.2}])
def test_code_that_fails_a_test_is_not_positive(settings):
    recipe = RewardRecipe(functions=[{"name": "python_tests", "partial": True}], **settings)
    found = combine({"python_tests": part(0.6, Outcome.INCORRECT)}, recipe)
    assert (found.value, found.positive, found.outcome) == (0.6, False, Outcome.INCORRECT)
    assert combine({"python_tests": part(1.0)}, recipe).positive


def test_no_verdict_of_one_function_is_no_verdict():
    recipe = RewardRecipe(functions=["exact", {"name": "exact", "label": "second"}])
    lost = Reward(value=0.0, outcome=Outcome.ERROR, detail="no such thing")
    found = combine({"exact": part(1.0), "second": lost}, recipe)
    assert (found.outcome, found.value, found.positive) == (Outcome.ERROR, 0.0, False)
    assert found.detail == "second: no such thing"


def test_several_functions_grade_in_a_worker():
    functions = ["math", {"name": "regex", "label": "format", "pattern": "=", "weight": 0.5}]
    with Grader(RewardRecipe(functions=functions, positive_if=["math", "format"], workers=1)) as grader:
        right, bare, wrong, none = grader.grade(
            [(text, problem_of()) for text in ("40 + 2 = \\boxed{42}", "\\boxed{42}", "= \\boxed{4}", "No idea.")]
        )
    assert (right.value, right.outcome, right.positive) == (1.0, Outcome.CORRECT, True)
    assert (bare.value, bare.outcome, bare.positive) == (pytest.approx(2 / 3), Outcome.INCORRECT, False)
    assert (wrong.parts, wrong.answer) == ({"math": 0.0, "format": 1.0}, "4")
    assert none.outcome is Outcome.UNPARSED


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('reward.functions=[{name="numeric", tolerence=1}]', '"numeric" has no key tolerence; did you mean tolerance?'),
        ('reward.functions=[{name="numeric", tolerance="x"}]', 'tolerance of "numeric" must be a finite number'),
        ('reward.functions=["math", {name="regex"}]', 'pattern of "regex" is required: text'),
        ("reward.functions=mth", 'did you mean "math"?'),
        ('reward.functions=[{weight=1}]', "names neither a built-in function"),
        ("reward.functions=[]", "must be a name, or a list of names and tables"),
        ('reward.functions=["math", "math"]', 'lists "math" twice; give one of them another label'),
        ('reward.functions=[{name="math", weight=-1}]', "need one with a weight above 0"),
        ('reward.functions=[{name="a:b", range=[1, 1]}]', "has an empty range"),
        ('reward.functions=[{name="regex", pattern="("}]', "is not a regular expression"),
        ('reward.functions=[{name="length"}]', "needs min or max"),
        ('reward.functions=[{name="json_schema"}]', "needs schema or schema_file"),
        ('reward.functions=["math", {name="numeric", weight=-1}, {name="exact", weight=-1}]',
         'make an answer positive without "math": their part of the weight, 0.667, is above reward.threshold = 0.5; '
         'set reward.positive_if = ["math"]'),
        ('reward.functions=[{name="length", max=9, weight=3}, "math"]', 'set reward.positive_if = ["math"]'),
        ('reward.positive_if=["exact"]', '"exact" is not one of reward.functions, which are "math"'),
        ('reward.functions=[{name="python_tests", timeout_seconds=5}]', 'has timeout_seconds = 5; set it below'),
        ("reward.function=math", "is called reward.functions here"),
        ("objective.reward_threshold=0.3", "is called reward.threshold here"),
    ],
)  # fmt: skip
def test_wrong_functions_are_named_when_the_recipe_is_read(override, said):
    with pytest.raises(UserInputError) as caught:
        load_recipe("tiny_cpu", [override])
    assert said in caught.value.what
    assert len(caught.value.what.splitlines()) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ['reward.functions=["a:accuracy", "a:format"]'],
        ['reward.functions=[{name="regex", pattern="x"}, {name="math", weight=0}]'],
        ['reward.functions=[{name="length", max=9, weight=3}, "math"]', 'reward.positive_if=["math"]'],
        ['reward.functions=["a:f", "a:g", "a:h"]', "reward.threshold=0.7"],
    ],
)
def test_functions_that_cannot_outvote_the_main_one_are_accepted(overrides):
    assert load_recipe("tiny_cpu", overrides).grading.functions


# --- TRL's form ---

TRL = """
import asyncio

def conversational(prompts, completions, solution, **kwargs):
    assert prompts[0][-1]["content"] == "How many?" and kwargs["level"] == [3] and kwargs["answer"] == ["42"]
    assert completions[0][0]["role"] == "assistant"
    assert kwargs["trainer_state"].global_step == 2 and kwargs["completion_ids"] == [[5, 6]]
    kwargs["log_extra"]("column", [1]); kwargs["log_metric"]("name", 1.0)
    return [1.0 if c[0]["content"] == str(s) else 0.0 for c, s in zip(completions, solution)]

def plain(prompts, completions):
    return [float(c.strip() == "42" and p == "How many?") for p, c in zip(prompts, completions)]

async def later(completions, **kwargs):
    await asyncio.sleep(0)
    return [None if "skip" in c[0]["content"] else 0.75 for c in completions]

def soft_overlong(completion_ids, **kwargs):
    return [-1.0 if len(ids) > 1 else 0.0 for ids in completion_ids]

class Judge:
    def __call__(self, completions, **kwargs):
        import numpy
        return numpy.array([0.25] * len(completions))

judge = Judge()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module `own` into the working directory."""
    monkeypatch.chdir(tmp_path)
    return lambda source: (tmp_path / "own.py").write_text(source)


def test_trls_functions_are_called_as_trl_calls_them(module):
    module(TRL)
    names = ("conversational", "plain", "later", "soft_overlong", "judge")
    functions = [{"name": f"own:{name}", "label": name} for name in names]
    functions[3] |= {"range": [-1, 0]}
    meta = {"solution": 42, "level": 3}
    with Grader(RewardRecipe(functions=functions, workers=1)) as grader:
        answers = [("42", problem_of(**meta)), ("skip", problem_of(**meta))]
        state = {"global_step": 2, "max_steps": 9}
        right, wrong = grader.grade(answers, completion_ids=[[5, 6]] * 2, trainer_state=state)
    assert right.parts == {"conversational": 1, "plain": 1, "later": 0.75, "soft_overlong": 0, "judge": 0.25}, right
    assert wrong.parts == {"conversational": 0, "plain": 0, "soft_overlong": 0, "judge": 0.25}, wrong


def test_the_form_that_the_trial_finds_holds_for_all_workers(module):
    """On the answers to grade, both forms would raise no error."""
    module(
        "def f(completions, answer):\n    if answer == ['tried']: completions[0].strip()\n"
        "    return [float(isinstance(completions[0], str))]\n"
    )
    with Grader(RewardRecipe(functions="own:f", workers=2)) as grader:
        grader.check([problem_of("tried")])
        assert [reward.value for reward in grader.grade([("x", problem_of())] * 8)] == [1.0] * 8


def test_a_function_that_takes_both_forms_must_give_the_same_value(module):
    module(
        "def f(completions, answer):\n    return [float(a in c) for c, a in zip(completions, answer)]\n"
        "def both(completions):\n    assert completions[0] != 'x', 'text'\n    return [0.75]\n"
    )
    with Grader(RewardRecipe(functions="own:f")) as grader, pytest.raises(UserInputError) as caught:
        grader.check([problem_of()])
    assert 'returned 0.0 with completions = "conversational" and 1.0 with completions = "text"' in caught.value.what
    assert '[{name = "own:f", completions = "text"}]' in caught.value.next_step
    with Grader(RewardRecipe(functions=[{"name": "own:f", "completions": "text"}])) as grader:  # as advised
        grader.check([problem_of()])
        assert grader.grade([("It is 42.", problem_of())])[0].positive
    with Grader(RewardRecipe(functions="own:both", workers=1)) as grader:
        grader.check([problem_of()])
        assert [reward.value for reward in grader.grade([("x", problem_of())])] == [0.75]


@pytest.mark.parametrize(
    ("body", "said", "advice"),
    [
        ("return 1.0", "returned 1.0 for one completion", "return a list"),
        ("return [1.0, 0.0]", "returned [1.0, 0.0] for one completion", "return a list"),
        ("return [2.5]", "returned 2.5, outside its range [0, 1]", '[{name = "own:f", range = [0, 3]}]'),
        ("return ['x']", "returned 'x'; a reward is a number", "correct the function"),
        ("return [float('nan')]", "returned nan", "correct the function"),
        ("return [kwargs['nothing']]", 'with completions = "conversational": KeyError: \'nothing\' (own.py:2); with '
         'completions = "text": KeyError: \'nothing\' (own.py:2)', "correct the function"),
    ],
)  # fmt: skip
def test_the_trial_names_file_key_function_and_row(module, body, said, advice):
    module(f"def f(completions, **kwargs):\n    {body}\n")
    with Grader(RewardRecipe(functions="own:f")) as grader, pytest.raises(UserInputError) as caught:
        grader.check([problem_of()])
    assert caught.value.where == "reward.functions"
    assert '"own:f" (' in caught.value.what
    assert "own.py:1) fails on the answer '42' to problem row-7: " in caught.value.what
    assert said in caught.value.what
    assert advice in caught.value.next_step


def test_what_the_trial_advises_works(module):
    module("def f(completions, **kwargs):\n    return [2.5]\n")
    with Grader(RewardRecipe(functions=[{"name": "own:f", "range": [0, 3]}])) as grader:
        grader.check([problem_of()])
        assert grader.grade([("x", problem_of())])[0].value == pytest.approx(2.5 / 3)


def test_a_missing_column_is_named_with_those_there_are(module):
    module("def f(completions, solution, **kwargs):\n    return [1.0]\n")
    with Grader(RewardRecipe(functions="own:f")) as grader, pytest.raises(UserInputError) as caught:
        grader.check([problem_of(level=3)])
    assert 'it needs the column "solution", and the rows have "answer", "level"' in caught.value.what


@pytest.mark.parametrize(
    ("body", "said"),
    [("return text.nothing", "AttributeError: 'str' object has no attribute 'nothing' (own.py:3)"),
     ("print('Waiting', flush=True); time.sleep(99)",
      "no verdict within reward.timeout_seconds = 1; the worker wrote:\nWaiting"),
     ("os._exit(3)", "ended the worker (exit code 3)")],
)  # fmt: skip
def test_the_trial_of_your_own_form(module, body, said):
    module(f"import os, time\ndef f(text, problem):\n    {body}\n")
    with (
        Grader(RewardRecipe(functions="own:f", timeout_seconds=1.0)) as grader,
        pytest.raises(UserInputError) as caught,
    ):
        grader.check([problem_of()])
    assert said in caught.value.what
    assert "row-7" in caught.value.what


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("time.sleep(99)", "no verdict within reward.timeout_seconds = 1"),
        ("os._exit(3)", "ended the worker (exit code 3)"),
    ],
)
def test_the_trial_of_an_environment(module, body, said):
    module(
        f"import os, time\nclass Game:\n    def reset(self, problem): pass\n    def reward(self): return 0\n"
        f"    def step(self, text):\n        {body}\n"
    )
    reward = RewardRecipe(functions=[{"name": "environment", "environment": "own:Game"}], timeout_seconds=1.0)
    with Grader(reward) as grader, pytest.raises(UserInputError) as caught:
        grader.check([problem_of()])
    assert said in caught.value.what


def test_a_built_in_function_that_raises_for_a_readable_reference_is_refused(monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise KeyError("schema")

    monkeypatch.setattr("popo_lite.grading.builtins.last_json", fails)
    functions = load_functions(RewardRecipe(functions=[{"name": "json_schema", "schema": {}}]), thinking_open=False)
    problem = {"id": "row-7", "question": "", "messages": [], "answer": "42", "meta": {}}
    with pytest.raises(UserInputError, match="KeyError: 'schema'"):
        try_functions(functions, "x", problem)


# --- references ---


def test_forty_thousand_references_take_about_a_second():
    problems = [problem_of(str(number), f"row-{number}") for number in range(40_000)]
    problems[12_345] = problem_of("twelve", "row-odd")
    with Grader(RewardRecipe(functions="numeric")) as grader:
        grader.check()
        started = time.monotonic()
        found = grader.unreadable(problems)
        assert time.monotonic() - started < 15  # 1 s on two quiet cores
    assert found == {"row-odd": "'twelve' holds no number"}


def test_a_check_that_hangs_makes_only_its_problem_unreadable():
    """The reference needs exponential time in the schema's pattern."""
    schema = {"type": "string", "pattern": "^(a+)+$"}
    functions = [{"name": "json_schema", "schema": schema, "equals_reference": True}]
    problems = [problem_of('"aa"', f"row-{number}") for number in range(50)]
    problems[20] = problem_of(f'"{"a" * 60}!"', "row-slow")
    with Grader(RewardRecipe(functions=functions, timeout_seconds=1.0)) as grader:
        assert grader.unreadable(problems) == {"row-slow": "checking it hung or ended its process"}


# --- whole runs ---


def test_functions_from_notebooks_train_unchanged(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "solution": a + b}
        for a in range(10, 40)
        for b in (12, 25)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    functions = (
        '[{name = "trl_rewards:accuracy_reward", weight = 2.0}, "trl_rewards:soft_format_reward", '
        '{name = "trl_rewards:box_count_reward", range = [-1, 0.5], weight = 0.5}]'
    )
    recipe = load_recipe("tiny_cpu", [
        f"data.dataset={tmp_path / 'sums.jsonl'}", "data.answer_column=solution", f"reward.functions={functions}",
        "eval.problems=0", "train.steps=1", "data.prompts_per_step=8",
    ])  # fmt: skip
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    with Trainer(recipe, Callback()) as trainer:
        trainer.run(run)
    (line,) = map(json.loads, run.metrics_path.read_text().splitlines())
    assert line["outcomes"]["error"] == line["outcomes"]["timeout"] == 0
    assert line["policy_version"] == 1
    assert line["rewards"].keys() == {f"trl_rewards:{name}_reward" for name in ("accuracy", "soft_format", "box_count")}
    assert 0 < line["rewards"]["trl_rewards:accuracy_reward"] < 1
    assert 0 < line["rewards"]["trl_rewards:box_count_reward"] <= 1


def test_a_range_that_is_too_small_is_noticed_before_the_weights_are_loaded(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("popo_lite.opening.load_policy", lambda _: pytest.fail("the weights were loaded"))
    with pytest.raises(UserInputError, match="outside its range"):
        Trainer(load_recipe("tiny_cpu", ['reward.functions=[{name="trl_rewards:box_count_reward", range=[0.4, 1]}]']),
                Callback())  # fmt: skip
