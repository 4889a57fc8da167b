"""The shapes of answers: what is alike, when a shape takes over, and that the trainer says it once, also resumed."""

from __future__ import annotations

import json
import random

import pytest

from popo_lite.callbacks import Callback
from popo_lite.run_folder import RunFolder
from popo_lite.shapes import count_takeover, shape_metrics, shape_of, start_shapes, takeover_message
from popo_lite.trainer import Trainer
from popo_lite.types import Completion, FinishReason, Group, Outcome, Problem, Prompt, Reward, Rollout


@pytest.mark.parametrize(
    ("text", "question", "shape"),
    [
        ("38 is larger than 83.", "Which number is larger, 38 or 83?", "_ is larger than _."),
        ("12  is larger\n than 90. ", "Which number is larger, 90 or 12?", "_ is larger than _."),
        ("Bob has more than Ann", "Ann has 3 apples, Bob 4. Who has more?", "_ has more than _"),
        ("5+7=12, 8+5+1=14, so \\boxed{142}", "What is 85 + 57?", "5+7=12, 8+5+1=14, so \\boxed{142}"),
        ("138 and 38kg and 3.8", "What is 38?", "138 and _kg and 3.8"),
        ("38比83大", "38和83哪个大?", "_比_大"),
        ("", "What?", ""),
    ],
)
def test_a_shape_hides_what_is_copied_from_the_question(text, question, shape):
    assert shape_of(text, question) == shape


def test_a_long_answer_is_known_by_its_ends():
    long = shape_of("word " * 1000 + "7", "Is it 7?")
    assert len(long) < 250
    assert long.startswith("word word")
    assert long.endswith("word _")


def group(a: int, b: int, answers: list[tuple[str, bool]]) -> Group:
    question = {"role": "user", "content": f"Which number is larger, {a} or {b}?"}
    prompt = Prompt(problem=Problem(id=f"{a}/{b}", messages=(question,), answer=str(max(a, b))), token_ids=(1,))
    return Group(
        rollouts=tuple(
            Rollout(
                prompt=prompt,
                completion=Completion(
                    token_ids=(1,), sampler_logps=(-1.0,), finish_reason=FinishReason.STOP, text=text
                ),
                reward=Reward(
                    value=float(right), outcome=Outcome.CORRECT if right else Outcome.INCORRECT, positive=right
                ),
                policy_version=0,
                index=index,
            )
            for index, (text, right) in enumerate(answers)
        )
    )


def made_up(step: int, hacked: float, other: str) -> list[Group]:
    """Eight prompts with four answers each, of which the fraction `hacked` have a shape that takes no work."""
    draw, groups = random.Random(step), []
    for a, b in {tuple(draw.sample(range(10, 100), 2)) for _ in range(8)}:
        hack = (f"{min(a, b)} is larger than {max(a, b)}.", True)
        work = other.format(difference=abs(a - b), right=max(a, b)), draw.random() < 0.5
        groups.append(group(a, b, [hack if draw.random() < hacked else work for _ in range(4)]))
    return groups


WORK = "The difference is {difference}, so \\boxed{{{right}}}"
COPY = "The larger is {right}"


def play(sequence, stop: int | None = None):
    """What is recorded and said of a made-up run; with `stop`, its state goes through JSON after that many steps."""
    state: dict = {"start": {}, "steps": {}}
    records, messages = [], []
    for step, groups in enumerate(sequence):
        if step == stop:
            state = json.loads(json.dumps(state))
        state["start"] = state["start"] or start_shapes(groups, 4)
        positives = sum(len(group.positives) for group in groups)
        counts = {"step": step, "positives": positives, "rollouts": sum(len(group.rollouts) for group in groups)}
        records.append({**counts, **shape_metrics(groups, state["start"])})
        state["steps"] = count_takeover(state["steps"], records[-1])
        messages.append(takeover_message(records[-1], groups, state["steps"]))
    return records, messages


def test_a_hack_is_reported_once_with_two_examples():
    records, messages = play(made_up(step, min(step / 20, 1.0), COPY) for step in range(40))
    assert records[0]["top_shape"] == "The larger is _"
    assert (records[-1]["top_shape"], records[-1]["top_shape_ratio"]) == ("_ is larger than _.", 1.0)
    (step,) = (step for step, message in enumerate(messages) if message)
    assert 5 <= step < 30
    first, second, *examples, advice = messages[step].splitlines()
    assert first == f"step {step + 1}: {records[step]['top_shape_ratio']:.0%} of the right answers look alike: " + (
        '"_ is larger than _."'
    )
    assert "0.0%" in second
    assert len(examples) == 2
    for example in examples:
        low, high = (int(example.split()[index].strip('".')) for index in (0, 4))
        assert low < high
        assert example.endswith(f"the reference is {high}")
    assert "samples.jsonl" in advice
    assert "reward.functions" in advice
    assert play((made_up(step, min(step / 20, 1.0), COPY) for step in range(40)), stop=step - 1) == (records, messages)


@pytest.mark.parametrize(
    ("hacked", "other"),
    [
        (lambda step: 0.0, WORK),  # differs from prompt to prompt
        (lambda step: 0.0, COPY),  # has the form that the model came with
        (lambda step: max(0.2, step / 40), COPY),
        (lambda step: float(step in (5, 9, 20, 30)), WORK),  # leads in a few steps only
    ],
)
def test_an_honest_run_is_not_reported(hacked, other):
    _, messages = play(made_up(step, hacked(step), other) for step in range(40))
    assert not any(messages)


def test_a_shape_of_few_right_answers_has_not_taken_over():
    def groups(right: int):
        return [group(a, a + 1, [("?", False)] * (20 - right) + [(f"{a} or {a + 1}", True)] * right)
                for a in range(10, 20)]  # fmt: skip

    assert play([groups(2)] * 10)[0][-1]["top_shape_ratio"] == 1.0
    assert not any(play([groups(2)] * 10)[1])
    messages = play([groups(2), *[groups(10)] * 9])[1]
    assert [bool(message) for message in messages] == [step == 5 for step in range(10)]


def test_what_one_prompt_repeats_is_no_shape_and_no_positives_give_none():
    alone = [group(38, 83, [("38 is larger than 83.", True)] * 4), group(12, 90, [("90", False)] * 4)]
    nothing = {"top_shape": None, "top_shape_ratio": 0.0, "top_shape_start_ratio": None}
    assert shape_metrics(alone, {}) == nothing
    assert shape_metrics(alone[1:], {}) == {**nothing, "top_shape_ratio": None}
    assert count_takeover({}, shape_metrics(alone, {})) == {}


def test_without_the_shapes_of_the_start_none_takes_over():
    copied = made_up(0, 1.0, COPY)
    counts = {"step": 9, "positives": 32, "rollouts": 32}
    record = {**counts, **shape_metrics(copied, {})}
    assert (record["top_shape"], record["top_shape_start_ratio"]) == ("_ is larger than _.", None)
    assert count_takeover({}, record) == {}
    assert takeover_message(record, copied, {}) is None
    assert count_takeover({}, {**counts, **shape_metrics(copied, {"other": 1})}) == {record["top_shape"]: 1}


def test_only_the_first_step_counts_as_the_start(tiny_recipe, tmp_path):
    recipe = tiny_recipe("eval.problems=0", "train.steps=3", "data.prompts_per_step=4", "rollout.num_generations=2")
    with Trainer(recipe, Callback()) as trainer:
        trainer.folder = RunFolder(tmp_path)
        trainer.train_step(1)
        assert trainer.cursor.start_shapes == {}
        trainer.train_step(0)
        start = dict(trainer.cursor.start_shapes)
        assert sum(start.values()) == 8
        trainer.train_step(1)
        assert trainer.cursor.start_shapes == start


class Heard(Callback):
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


@pytest.mark.slow
def test_the_trainer_reports_a_reward_that_is_gamed(tiny_recipe, tmp_path, monkeypatch):
    """The reward takes one number for the answer to every sum."""
    (tmp_path / "gamed_reward.py").write_text("def grade(text, problem):\n    return text == '\\\\boxed{123}'\n")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = tiny_recipe('reward.functions="gamed_reward:grade"', "eval.problems=0", "train.steps=9",
                         "data.prompts_per_step=16", "rollout.max_completion_length=16", "optimizer.learning_rate=5e-3",
                         "optimizer.warmup_ratio=0.0", 'optimizer.schedule="constant"')  # fmt: skip
    run, heard = RunFolder(tmp_path / "run"), Heard()
    run.path.mkdir()
    with Trainer(recipe, heard) as trainer:
        trainer.run(run)
    (told,) = (message for message in heard.messages if "look alike" in message)
    assert '"\\boxed{123}"' in told.splitlines()[0]
    assert told.count('"\\boxed{123}" counts as right; the reference is ') == 2
    last = json.loads(run.metrics_path.read_text().splitlines()[-1])
    assert (last["top_shape"], last["top_shape_ratio"]) == ("\\boxed{123}", 1.0)
    assert last["top_shape_start_ratio"] < 0.05
