"""Conversations with an environment: what is sampled, graded, trained, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from popo_lite.callbacks import Callback
from popo_lite.conversation import RolloutWorker
from popo_lite.errors import ModelError, UserInputError
from popo_lite.grading import Grader
from popo_lite.policy.policy import load_policy
from popo_lite.policy.tokens import open_renderer
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder, read_lines
from popo_lite.samplers import SamplingParams, open_sampler
from popo_lite.tasks import open_tasks
from popo_lite.trainer import Trainer
from popo_lite.types import FinishReason, Outcome

GAME = '''
import os, time

class Game:
    """Says "more" until it has heard `turns` answers; right if their number is that of the options."""

    def __init__(self, turns=2, trouble=""):
        self.turns, self.trouble = turns, trouble

    def reset(self, problem):
        self.heard, self.question = [], problem["question"]

    def step(self, text):
        self.heard.append(text)
        if self.trouble and len(self.heard) == 2:
            {"raise": lambda: 1 / 0, "hang": lambda: time.sleep(60), "die": lambda: os._exit(3),
             "memory": lambda: bytearray(2**40)}[self.trouble]()
        return f"more of {self.question}" if self.trouble != "number" else 7, len(self.heard) == self.turns

    def reward(self):
        return len(self.heard) == self.turns and len(self.heard[0]) % 2 == 0

class Unfinished:
    def reset(self, problem): ...
    def step(self, text): ...
'''


@pytest.fixture
def game(tmp_path, monkeypatch, tiny_recipe):
    """`game(*overrides)`: a recipe of conversations with the tiny model."""
    (tmp_path / "a_game.py").write_text(GAME)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda *overrides: tiny_recipe(
        'rollout.environment.name="a_game:Game"', "rollout.max_completion_length=200", "reward.timeout_seconds=1.5",
        "eval.problems=0", "rollout.max_num_seqs=64", *overrides,
    )  # fmt: skip


@pytest.fixture
def converse(game):
    def conversations(*overrides, count=4):
        """Return (policy, renderer, prompts, completions, their rewards)."""
        recipe = game(*overrides)
        policy, renderer = load_policy(recipe), open_renderer(recipe)
        problems = [open_tasks(recipe)[0].train_problem(0, index) for index in range(3)]
        prompts = [renderer.render(problem) for problem in problems]
        with (
            Grader(recipe.grading) as grader,
            open_sampler(recipe, policy, text=renderer.text, notify=pytest.fail) as sampler,
        ):
            ended = []
            worker = RolloutWorker(recipe=recipe, renderer=renderer, sampler=sampler, grader=grader)
            completions = worker.sample(
                prompts, count=count,
                params=SamplingParams(
                    temperature=1.0, max_completion_length=recipe.rollout.max_completion_length
                ),
                policy_version=policy.version, stream=("test",), finished=ended.append,
            )  # fmt: skip
            flat = [(p, one) for p, group in zip(prompts, completions, strict=True) for one in group]
            rewards = worker.grade([(one, p.problem) for p, one in flat], step=0)
        assert sum(ended) == len(flat)
        return policy, renderer, flat, rewards

    return conversations


def test_a_conversation_is_what_the_chat_template_writes(converse):
    policy, renderer, flat, rewards = converse("rollout.environment.options={turns = 3}")
    for prompt, one in flat:
        if one.finish_reason is FinishReason.LENGTH:
            continue
        assert [message["role"] for message in one.messages] == ["assistant", "user"] * 2 + ["assistant"]
        written = renderer.tokenizer.apply_chat_template(
            [*prompt.problem.messages, *one.messages], chat_template=renderer.chat_template, tokenize=False
        )
        # Only the tokens are compared with what they spell: the same text can be written with other tokens.
        assert renderer.tokenizer.decode([*prompt.token_ids, *one.token_ids]) == written
        own = [token for token, mine in zip(one.token_ids, one.loss_mask, strict=True) if mine]
        texts = [message["content"] for message in one.messages if message["role"] == "assistant"]
        assert renderer.text(own) == "".join(texts)
        assert sum(token in policy.stop_ids for token in own) == 3
    assert sum(one.finish_reason is FinishReason.STOP for _, one in flat) > 6
    assert {reward.outcome for reward in rewards} == {Outcome.CORRECT, Outcome.INCORRECT}


def test_the_sampler_gives_the_log_probs_of_the_whole_sequence(converse):
    policy, _, flat, _ = converse("rollout.environment.options={turns = 3}")
    for prompt, one in flat:
        ids, start = torch.tensor(prompt.token_ids + one.token_ids), len(prompt.token_ids)
        with torch.no_grad():
            logits = policy.head.logits(policy.hidden_states(ids, [(len(ids),)])[start - 1 : -1])
        logps = logits.log_softmax(-1).gather(1, ids[start:, None])[:, 0][torch.tensor(one.loss_mask)]
        torch.testing.assert_close(logps, torch.tensor(one.sampler_logps), rtol=0, atol=1e-4)


def test_more_samples_are_those_of_one_call(converse):
    four, two = (converse(count=count)[2] for count in (4, 2))
    assert [one.messages for _, one in two] == [one.messages for n, (_, one) in enumerate(four) if n % 4 < 2]


def test_there_is_no_answer_without_room(converse):
    _, _, flat, _ = converse("rollout.environment.options={turns = 9}", "rollout.environment.max_turns=9",
                             "rollout.max_completion_length=60")  # fmt: skip
    assert all(len(one.token_ids) <= 60 for _, one in flat)
    assert all(one.messages[-1]["role"] == "assistant" for _, one in flat)
    assert all(one.loss_mask[-1] for _, one in flat)


@pytest.mark.parametrize(
    ("trouble", "outcome", "detail"),
    [
        ("raise", Outcome.ERROR, "ZeroDivisionError"),
        ("number", Outcome.ERROR, "step returned 7 for the observation"),
        ("hang", Outcome.TIMEOUT, "timeout_seconds"),
        ("die", Outcome.ERROR, "ended the worker twice"),
        ("memory", Outcome.ERROR, "ended the worker twice"),
    ],
)
def test_an_environment_in_trouble_ends_its_conversation_without_a_verdict(converse, trouble, outcome, detail):
    options = f'rollout.environment.options={{trouble = "{trouble}", turns = 3}}'
    _, _, flat, rewards = converse(options, "reward.workers=4", count=1)
    failed = [one.failed for _, one in flat if one.failed]
    assert failed
    assert all(one.outcome is outcome and detail in one.detail for one in failed)
    # What failed once has no verdict, even if it would not fail again.
    assert [reward for (_, one), reward in zip(flat, rewards, strict=True) if one.failed] == failed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('rollout.environment.name="a_game:Gmae"', "has no attribute 'Gmae'"),
        ('rollout.environment.name="a_game:Unfinished"', "no attribute 'reward'"),
        ("rollout.environment.options={turn = 3}", "unexpected keyword argument 'turn'"),
    ],
)
def test_what_is_no_environment_is_refused_before_the_model_is_loaded(game, monkeypatch, override, message):
    monkeypatch.setattr("popo_lite.opening.load_policy", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserInputError, match=message):
        Trainer(game(override), Callback())


def test_a_template_without_conversations_is_refused(game):
    template = "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ModelError, match="takes no conversation with an environment: it leaves out the role tool"):
        Trainer(game(f'data.chat_template="{template}"', 'rollout.environment.role="tool"'), Callback())


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2] / "examples" / "guessing_game")
    recipe = load_recipe("recipe.toml", ["train.steps=1", "eval.samples_per_problem=1", "rollout.num_generations=2"])
    (tmp_path / "run").mkdir()
    with Trainer(recipe, Callback()) as trainer:
        assert trainer.run(RunFolder(tmp_path / "run")).summary is not None


def test_a_run_trains_and_says_what_was_said(game, tmp_path):
    (tmp_path / "run").mkdir()
    recipe = game("train.steps=2", "data.prompts_per_step=4", "eval.problems=4", 'reward.functions=["environment"]')
    with Trainer(recipe, Callback()) as trainer:
        trainer.run(folder := RunFolder(tmp_path / "run"))
    lines = read_lines(folder.metrics_path)
    assert all(line["skipped_reason"] is None and line["logp_gap_max"] < 1e-4 for line in lines)
    answer = read_lines(folder.samples_path)[0]["answers"][0]
    assert [message["role"] for message in answer["messages"]] == ["assistant", "user", "assistant"]
