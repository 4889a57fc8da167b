"""Running out of memory, injected at every stage of a step: the update is the same, and nothing is lost."""

from __future__ import annotations

import json

import pytest
import torch

from popo_lite import update as update_module
from popo_lite.callbacks import Callback
from popo_lite.errors import EngineError
from popo_lite.policy.memory import is_out_of_memory
from popo_lite.resuming import resumed_recipe
from popo_lite.run_folder import RunFolder
from popo_lite.samplers import SamplingParams
from popo_lite.types import FinishReason
from updates import assert_same, groups_of, trainer_of, update


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def short_of_memory(monkeypatch, policy, limit, *, when):
    """From `limit` tokens on a pass of `policy` fails: in its "forward", in "backward" when most gradients are made, or
    when all are and its "metrics" are read."""
    compute = policy.hidden_states
    refused = []

    def hidden_states(input_ids, row):
        def fail(_):
            refused.append(len(input_ids))
            raise out_of_memory()

        if len(input_ids) > limit and when == "forward":
            fail(None)
        hidden = compute(input_ids, row)
        if len(input_ids) > limit and hidden.requires_grad and when == "backward":
            # The first layer's adapters are the last to get theirs: almost all others have been added by then.
            first = policy.adapter_parameters()[0][1]
            handle = first.register_hook(lambda grad: (handle.remove(), fail(grad)))
        return hidden

    read = update_module._to_host

    def to_host(terms, log_ratios):
        if when == "metrics" and len(log_ratios) > limit // 2:
            refused.append(len(log_ratios))
            raise out_of_memory()
        return read(terms, log_ratios)

    monkeypatch.setattr(update_module, "_to_host", to_host)
    monkeypatch.setattr(policy, "hidden_states", hidden_states)
    return refused


VARIANTS = [(), ('objective.weights_from="trainer"',), ('objective.entropy_over="all"', 'objective.target="features"')]


@pytest.mark.parametrize("when", ["forward", "backward", "metrics"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_that_ran_out_of_memory_is_the_same_update(trainer, monkeypatch, variant, when):
    whole, short = trainer(*variant), trainer(*variant)
    groups = groups_of(whole)
    expected = update(whole, groups)
    told = []
    monkeypatch.setattr(short.learner.micro_batches, "_notify", told.append)
    refused = short_of_memory(monkeypatch, short.policy, 150, when=when)
    found = update(short, groups)
    assert len(refused) >= 2
    assert_same(found, expected)
    assert int(found["micro_batches"]) > 3
    assert short.learner.micro_batches.budget_tokens <= 150
    assert all("memory ran out in the" in text for text in told)
    # Remembered: the next step does not try again.
    again = len(refused)
    assert_same(update(short, groups), expected)
    assert len(refused) == again


def test_a_sequence_that_does_not_fit_alone_is_named_with_what_helps(trainer, monkeypatch):
    one = trainer()
    short_of_memory(monkeypatch, one.policy, 40, when="backward")
    with pytest.raises(EngineError, match=r"update pass of a single sequence of \d+ tokens") as caught:
        update(one, groups_of(one))
    assert caught.value.where.startswith("problem ")
    assert "--set" in caught.value.next_step
    assert all(parameter.grad is None for _, parameter in one.policy.trainable_parameters())


def test_other_errors_are_not_taken_for_it(trainer, monkeypatch):
    one = trainer()
    monkeypatch.setattr(one.policy, "hidden_states", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        update(one, groups_of(one))
    for text in (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
    ):
        assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("CUDA out of memory"))


def small(tiny_recipe, *overrides):
    return tiny_recipe(
        "train.steps=4", "data.prompts_per_step=8", "rollout.num_generations=4", "eval.problems=8",
        "train.save_steps=2", "rollout.max_completion_length=32", *overrides,
    )  # fmt: skip


class Messages(Callback):
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


def fails_once(monkeypatch, owner, name, *, call=1):
    """The `call`-th call of owner.name runs out of memory."""
    original, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise out_of_memory()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return calls


def test_rollouts_are_the_same_with_fewer_at_once(tiny_recipe, monkeypatch):
    view = Messages()
    recipe = small(tiny_recipe)
    with trainer_of(recipe, view) as one:
        prompts = [one.renderer.render(one.train_task.train_problem(0, index)) for index in range(6)]

        def draw():
            ended = []
            found = one.sampler.sample(
                prompts,
                count=4,
                params=SamplingParams(temperature=1.0, max_completion_length=32),
                policy_version=0,
                stream=("x",),
                finished=ended.append,
            )
            return found, sum(ended)

        expected, count = draw()
        fails_once(monkeypatch, one.policy, "run_trunk", call=12)
        found, told = draw()
    assert told == count == 24
    assert [[c.token_ids for c in group] for group in found] == [[c.token_ids for c in group] for group in expected]
    assert any(c.finish_reason is FinishReason.STOP for group in found for c in group)
    assert view.messages == ["memory ran out with 24 sequences at once; 12 at once from now on"]


@pytest.mark.parametrize(
    ("owner", "name", "call", "saved"),
    [
        ("learner", "prepare", 3, "step-000002"),
        ("learner.optimizer", "step", 4, "step-000002"),
        ("sampler", "sync", 4, "step-000004"),
        ("sampler", "sample", 1, None),
        ("sampler", "sample", 4, "step-000002"),
    ],
)
def test_where_nothing_can_be_cut_the_run_ends_saved_and_goes_on(
    tiny_recipe, monkeypatch, tmp_path, owner, name, call, saved
):
    """What memory runs out for has no smaller form: the update, the way to the sampler, an engine's answer."""
    recipe = small(tiny_recipe)
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    for folder in (whole, broken):
        folder.path.mkdir()
    with trainer_of(recipe) as one:
        one.run(whole)
    with trainer_of(recipe) as one:
        target = one
        for part in owner.split("."):
            target = getattr(target, part)
        fails_once(monkeypatch, target, name, call=call)
        with pytest.raises(EngineError, match="the GPU ran out of memory") as caught:
            one.run(broken)
    assert "--set" in caught.value.next_step
    if saved:
        assert saved in caught.value.what
    with trainer_of(recipe) as one:
        one.run(broken, resume=True)
    for file in ("adapter/adapter_model.safetensors", "siamese/adapter_model.safetensors"):
        assert (broken.path / file).read_bytes() == (whole.path / file).read_bytes()


def test_a_run_with_a_sequence_that_does_not_fit_is_saved_and_goes_on_where_it_does(tiny_recipe, monkeypatch, tmp_path):
    recipe = small(tiny_recipe)
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    for folder in (whole, broken):
        folder.path.mkdir()
    with trainer_of(recipe) as one:
        one.run(whole)
    with trainer_of(recipe) as one:
        step = one.train_step

        def train_step(number):
            if number == 3:
                short_of_memory(monkeypatch, one.policy, 20, when="backward")
            step(number)

        monkeypatch.setattr(one, "train_step", train_step)
        with pytest.raises(EngineError, match="a single sequence of") as caught:
            one.run(broken)
    # What is said to be changed on resuming may be changed on resuming.
    resume_with, _, anew = caught.value.next_step.partition("in a new run")
    assert "--set " in anew
    intro, *options = resume_with.splitlines()
    assert intro == "resume with one of:"
    assert len(options) > 1
    for option in options:
        resumed_recipe(broken, option.split("--set ")[1:])
    assert [folder.name for folder in sorted(broken.checkpoints.iterdir())] == ["step-000002", "step-000003"]
    with trainer_of(recipe) as one:
        one.run(broken, resume=True)
    file = "adapter/adapter_model.safetensors"
    assert (broken.path / file).read_bytes() == (whole.path / file).read_bytes()


def test_the_lowered_budget_is_told_logged_and_survives_the_run(tiny_recipe, monkeypatch, tmp_path):
    recipe = small(tiny_recipe)
    folder = RunFolder(tmp_path)
    view = Messages()
    with trainer_of(recipe, view) as one:
        short_of_memory(monkeypatch, one.policy, 300, when="backward")
        one.run(folder)
        lowered = one.learner.micro_batches.budget_tokens
    assert lowered <= 300
    assert any("the step goes on, with micro-batches of at most" in text for text in view.messages)
    lines = [json.loads(line) for line in folder.metrics_path.read_text().splitlines()]
    assert lines[-1]["microbatch_tokens"] == lowered
    folder.summary_path.unlink()
    with trainer_of(recipe) as one:
        one.folder = folder
        one._restore()
        assert one.learner.micro_batches.budget_tokens == lowered
    with trainer_of(small(tiny_recipe, "train.tokens_per_microbatch=9000")) as one:
        one.folder = folder
        one._restore()
        assert one.learner.micro_batches.budget_tokens == 9000  # another budget in the recipe is a new try
