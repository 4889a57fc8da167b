"""The rollout budgets, which problems a step takes, and the figures that must not depend on when sampling stopped."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from popo_lite.callbacks import Callback
from popo_lite.curriculum import (
    LOOK_AHEAD,
    MIN_ANSWERS,
    Budget,
    Seen,
    choose_problems,
    collect,
    is_known,
    remember,
)
from popo_lite.errors import RecipeError
from popo_lite.interrupts import StageClock
from popo_lite.metrics import rollout_metrics
from popo_lite.run_folder import RunFolder
from popo_lite.samplers import SamplingParams
from popo_lite.tasks import ArithmeticTask, open_tasks
from popo_lite.trainer import Trainer
from popo_lite.types import FinishReason, Group, Outcome, Reward

ADAPTIVE = ('rollout.adaptive.enabled=true', "rollout.adaptive.positives_wanted=2", "rollout.adaptive.round_size=4",
            "rollout.adaptive.max_rollouts=24", "data.prompts_per_step=12")  # fmt: skip


# --------------------------------------------------------------------- dealing out


def test_the_fixed_budget_is_one_round_of_g(tiny_recipe):
    budget = Budget.of(tiny_recipe("rollout.num_generations=6").rollout)
    assert budget.next_round([0, 0, 0], made=0, total=0) == ([0, 1, 2], 6)
    assert budget.next_round([0, 6, 1], made=6, total=18)[0] == []


def test_a_round_is_for_those_that_need_more_and_have_not_had_the_most():
    budget = Budget(round_size=4, positives_wanted=2, max_rollouts=10, mean_rollouts=8)
    assert budget.next_round([0, 2, 1, None, 3], made=4, total=20) == ([0, 2], 4)
    assert budget.next_round([0, 1, None, None, None], made=8, total=28) == ([0, 1], 2)
    assert budget.next_round([0, 1, None, None, None], made=10, total=32)[0] == []


def test_what_is_left_goes_to_those_with_the_fewest_positives():
    budget = Budget(round_size=4, positives_wanted=3, max_rollouts=32, mean_rollouts=8)
    assert budget.next_round([1, 0, 2, 0], made=4, total=16) == ([0, 1, 2, 3], 4)
    assert budget.next_round([1, 0, 2, 0], made=4, total=22) == ([1, 3], 4)
    assert budget.next_round([1, 1, 2, 1], made=4, total=22) == ([0, 1], 4)
    assert budget.next_round([1, 0, 2, 0], made=4, total=29)[0] == []


def test_settings_that_cannot_go_together_are_refused(tiny_recipe):
    with pytest.raises(RecipeError, match=r"rollout.adaptive.round_size = 12.*num_generations"):
        tiny_recipe("rollout.adaptive.enabled=true", "rollout.adaptive.round_size=12")
    with pytest.raises(RecipeError, match=r"rollout.adaptive.positives_wanted = 40.*max_rollouts"):
        tiny_recipe("rollout.adaptive.enabled=true", "rollout.adaptive.positives_wanted=40")


# --------------------------------------------------------------------- gathering, on the real model


@pytest.fixture
def gathered(tiny_recipe):
    """`gathered(*overrides)`: (groups of step 3, the trainer)."""
    opened = []

    def gather(*overrides):
        trainer = Trainer(tiny_recipe("eval.problems=0", *overrides), Callback())
        opened.append(trainer)
        choice = choose_problems(trainer.train_task, trainer.recipe, step=3, first=36, history={})
        prompts = [trainer.renderer.render(problem) for problem in choice.problems]
        clock = StageClock(Callback(), torch.device("cpu"))
        groups = collect(prompts, trainer.worker, trainer.policy.version, step=3, clock=clock, progress=lambda _: None)
        assert list(clock.seconds) == ["rollout", "grade"]
        return groups, trainer

    yield gather
    for trainer in opened:
        trainer.__exit__()


@pytest.mark.parametrize("settings", [(2, 4, 24), (1, 2, 32), (3, 3, 10), (1, 8, 8)])
def test_adaptive_groups_are_the_beginnings_of_large_fixed_ones(gathered, settings):
    """The same streams as one round of 32, cut where the rule says, within the budget of the step."""
    wanted, size, most = settings
    groups, trainer = gathered(*ADAPTIVE, f"rollout.adaptive.positives_wanted={wanted}",
                               f"rollout.adaptive.round_size={size}",
                               f"rollout.adaptive.max_rollouts={most}")  # fmt: skip
    whole, _ = gathered("rollout.num_generations=32", "data.prompts_per_step=12")
    assert [group.prompt for group in groups] == [group.prompt for group in whole]
    for group, large in zip(groups, whole, strict=True):
        assert [rollout.index for rollout in group.rollouts] == list(range(len(group.rollouts)))
        for rollout, expected in zip(group.rollouts, large.rollouts, strict=False):
            assert rollout.completion.token_ids == expected.completion.token_ids
            assert rollout.reward == expected.reward
    total = sum(len(group.rollouts) for group in groups)
    left = len(groups) * trainer.recipe.rollout.num_generations - total
    assert left >= 0
    for group in groups:
        made = len(group.rollouts)
        before_last = [r for r in group.positives if r.index < (made - 1) // size * size]
        assert len(before_last) < wanted
        assert made <= most
        if len(group.positives) < wanted and made < most:
            assert left < size
    if size < 8:
        assert len({len(group.rollouts) for group in groups}) > 1


def test_a_fixed_group_is_what_the_sampler_draws_at_once(gathered):
    groups, trainer = gathered("data.prompts_per_step=4")
    drawn = trainer.sampler.sample(
        [group.prompt for group in groups], count=8,
        params=SamplingParams(temperature=1.0, max_completion_length=64), policy_version=0, stream=("rollout", 0, 3),
    )  # fmt: skip
    assert [[r.completion for r in group.rollouts] for group in groups] == drawn


def test_adaptive_reaches_more_prompts_with_no_more_rollouts(gathered):
    """Three-digit sums, a pass rate of about a quarter: 32 prompts."""
    options = ("data.digits=3", "data.prompts_per_step=32", "rollout.num_generations=4")
    fixed, _ = gathered(*options)
    adaptive, _ = gathered(
        *options,
        "rollout.adaptive.enabled=true",
        "rollout.adaptive.positives_wanted=1",
        "rollout.adaptive.max_rollouts=32",
    )
    reached = [sum(bool(group.positives) for group in groups) for groups in (fixed, adaptive)]
    assert reached[1] >= reached[0] + 3
    assert sum(len(group.rollouts) for group in adaptive) <= 32 * 4


def test_an_answer_that_was_cut_off_can_be_wrong(gathered, tmp_path, monkeypatch):
    """A kind grader calls all answers right; with room for the direct ones alone, many are cut off."""
    (tmp_path / "kind_rewards.py").write_text("def right(text, answer):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    options = ("data.prompts_per_step=12", "rollout.max_completion_length=12", 'reward.functions="kind_rewards:right"')
    graded, _ = gathered(*options)
    strict, _ = gathered(*options, "reward.truncated=wrong")
    changed = 0
    for before, after in zip(graded, strict, strict=True):
        for one, other in zip(before.rollouts, after.rollouts, strict=True):
            assert (one.completion, one.reward.value) == (other.completion, 1.0)
            if one.completion.finish_reason is FinishReason.LENGTH:
                assert (other.reward.value, other.reward.outcome) == (0.0, Outcome.INCORRECT)
                assert other.reward.detail == "cut off at rollout.max_completion_length"
                changed += 1
            else:
                assert other.reward == one.reward
    assert 10 < changed < 12 * 8 - 10


def test_figures_that_describe_the_policy_count_the_first_round(gathered):
    groups, _ = gathered(*ADAPTIVE)
    task = ArithmeticTask(2)
    found = rollout_metrics(groups, task, first_round=4)
    firsts = [Group(rollouts=group.rollouts[:4]) for group in groups]
    of_firsts = rollout_metrics(firsts, task, first_round=4)
    for name in (
        "pass_rate",
        "rewards",
        "unique_answers_mean",
        "task_figures",
        "truncated_ratio",
        "completion_tokens_mean",
        "sampled_entropy",
    ):
        assert found[name] == of_firsts[name], name
    logps = [logp for group in firsts for r in group.rollouts for logp in r.completion.sampler_logps]
    assert found["sampled_entropy"] == pytest.approx(-sum(logps) / len(logps), rel=1e-12)
    assert 0.1 < found["sampled_entropy"] < 1.5
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert found["pass_rate"] == of_firsts["positives"] / 48 != found["positives"] / len(rollouts)
    assert found["rollouts"] == sum(found["outcomes"].values()) == len(rollouts) > 48
    reached = sum(bool(group.positives) for group in groups)
    assert found["prompts_with_positive"] == reached > 0
    assert found["rollouts_per_positive_prompt"] == len(rollouts) / reached
    assert found["rollout_tokens_per_positive_prompt"] * reached == pytest.approx(
        sum(len(rollout.completion.token_ids) for rollout in rollouts)
    )
    for name, counted in (
        ("tokens_of_all", rollouts),
        ("tokens_of_positives", [r for r in rollouts if r.reward.value > 0.5]),
        (
            "tokens_of_mixed_groups",
            [r for g in groups if 0 < len(g.positives) < len(g.rollouts) for r in g.rollouts],
        ),
    ):
        assert found[name] == sum(len(r.prompt.token_ids) + len(r.completion.token_ids) for r in counted) > 0, name
    hopeless = [group for group in groups if not group.positives] or [
        Group(rollouts=tuple(r for r in groups[0].rollouts if r.reward.value == 0))
    ]
    assert rollout_metrics(hopeless, task, first_round=4)["rollouts_per_positive_prompt"] is None


# --------------------------------------------------------------------- which problems a step takes


@pytest.fixture
def small_file(tmp_path):
    rows = [{"id": f"n{n}", "prompt": f"What is {n} + 11?", "answer": n + 11} for n in range(10, 40)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def skipping(tiny_recipe, small_file):
    def make(*overrides):
        recipe = tiny_recipe(f'data.dataset="{small_file}"', "eval.problems=0", "data.prompts_per_step=6",
                             "rollout.skip_known=true", "rollout.explore_ratio=0.0", *overrides)  # fmt: skip
        return recipe, open_tasks(recipe)[0]

    return make


def test_without_skipping_a_step_takes_the_next_p(skipping):
    recipe, task = skipping("rollout.skip_known=false")
    known = {f"n{n}": Seen(8, 8, 0) for n in range(10, 40)}
    choice = choose_problems(task, recipe, step=2, first=12, history=known)
    assert [p.id for p in choice.problems] == [task.train_problem(0, index).id for index in range(12, 18)]
    assert (choice.skipped, choice.next_problem) == (0, 18)


def test_known_problems_are_left_out_and_the_stream_moves_on(skipping):
    recipe, task = skipping()
    stream = [task.train_problem(0, index).id for index in range(30)]
    history = {stream[0]: Seen(8, 8, 0), stream[2]: Seen(8, 0, 0), stream[3]: Seen(8, 3, 0), stream[7]: Seen(4, 4, 1)}
    choice = choose_problems(task, recipe, step=1, first=0, history=history)
    assert [p.id for p in choice.problems] == [stream[index] for index in (1, 3, 4, 5, 6, 8)]
    assert (choice.skipped, choice.next_problem) == (3, 9)


def test_a_known_dataset_still_gives_prompts_those_sampled_longest_ago(skipping):
    recipe, task = skipping()
    history = {f"n{n}": Seen(8, 8, 100 - n) for n in range(10, 40)}
    choice = choose_problems(task, recipe, step=200, first=0, history=history)
    assert {p.id for p in choice.problems} == {f"n{n}" for n in range(34, 40)}
    assert (choice.skipped, choice.next_problem) == (24, LOOK_AHEAD * 6)


def test_a_share_of_known_problems_is_explored_by_seed_and_step(skipping):
    recipe, task = skipping("rollout.explore_ratio=0.25", "data.prompts_per_step=1")
    problem = task.train_problem(0, 0)
    history = {p.id: Seen(8, 0, 0) for p in (task.train_problem(0, index) for index in range(30))}
    first = [choose_problems(task, recipe, step=step, first=0, history=history) for step in range(2000)]
    again = [choose_problems(task, recipe, step=step, first=0, history=history) for step in range(2000)]
    assert first == again
    explored = sum(choice.problems[0].id == problem.id and choice.next_problem == 1 for choice in first)
    assert abs(explored / 2000 - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (Seen(8, 8, 0), True),
        (Seen(MIN_ANSWERS, MIN_ANSWERS, 0), True),
        (Seen(MIN_ANSWERS - 1, MIN_ANSWERS - 1, 0), False),
        (Seen(8, 7, 0), False),
        (Seen(8, 0, 0), True),
        (Seen(7, 0, 0), False),  # an adaptive budget ran out on it
        (Seen(32, 1, 0), False),
    ],
)
def test_what_counts_as_known(tiny_recipe, seen, expected):
    assert is_known(seen, tiny_recipe("rollout.adaptive.enabled=true")) is expected


def test_only_the_last_result_is_remembered_and_doubt_forgets(tiny_recipe, gathered):
    groups, trainer = gathered(*ADAPTIVE, "rollout.skip_known=true")
    recipe, ids = trainer.recipe, [group.prompt.problem.id for group in groups]
    before = {ids[0]: Seen(8, 8, 0), ids[1]: Seen(8, 8, 0), "other": Seen(8, 0, 1)}
    lost = dataclasses.replace(groups[1].rollouts[0], reward=Reward(value=0.0, outcome=Outcome.TIMEOUT))
    doubtful = Group(rollouts=(lost, *groups[1].rollouts[1:]))
    after = remember(before, [groups[0], doubtful, *groups[2:]], recipe, 5)
    assert before[ids[0]] == Seen(8, 8, 0)
    assert after["other"] == Seen(8, 0, 1)
    assert after[ids[0]] == Seen(len(groups[0].rollouts), len(groups[0].positives), 5)
    assert ids[1] not in after
    assert after.keys() == {"other", *ids} - {ids[1]}
    assert remember(before, groups, tiny_recipe(), 5) == {}


def test_a_run_counts_what_its_steps_did(tiny_recipe, small_file, tmp_path):
    recipe = tiny_recipe(*ADAPTIVE, f'data.dataset="{small_file}"', "eval.problems=0", "train.steps=4",
                         "rollout.skip_known=true", "data.prompts_per_step=10",
                         "rollout.num_generations=5")  # fmt: skip
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    with Trainer(recipe, Callback()) as trainer:
        summary = trainer.run(run).summary
        cursor = trainer.cursor
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    for name in ("rollouts", "rollout_tokens", "prompts_with_positive", "prompts_skipped"):
        assert summary[name] == sum(line[name] for line in lines), name
    assert all(line["rollouts"] <= line["prompts"] * 5 for line in lines)
    assert cursor.next_problem == sum(line["prompts"] + line["prompts_skipped"] for line in lines)
    assert 0 < len(cursor.history) <= 30
