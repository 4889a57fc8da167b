"""The comparison itself: greedy answers and log-probs against transformers' own, and what counts as rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from popo_lite.errors import ExportError
from popo_lite.policy.policy import Policy, load_policy
from popo_lite.recipe_file import load_recipe
from popo_lite.tasks import ArithmeticTask
from popo_lite.tasks.rendering import Renderer
from popo_lite.tools.export.verify import ROUNDING, Tokens, greedy, log_probs, parting, refuse_beyond_rounding

RECIPE = load_recipe("tiny_cpu", ("model.quantization=none", "rollout.temperature=0.5"))
LIMIT = 8


@pytest.fixture(scope="module")
def asked() -> tuple[Policy, list[Tokens], list[Tokens]]:
    policy = load_policy(RECIPE)
    renderer = Renderer(RECIPE, policy.tokenizer)
    # Prompts of several lengths, more than one batch, and a limit that cuts the longest answers.
    problems = [problem for digits in (2, 3, 4) for problem in ArithmeticTask(digits).held_out(8)]
    prompts = [renderer.token_ids(problem) for problem in problems]
    return policy, prompts, greedy(policy.model.get_base_model(), prompts, policy.stop_ids, LIMIT)


def test_greedy_answers_are_those_of_generate(asked: tuple) -> None:
    policy, prompts, answers = asked
    lengths = set()
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        expected = policy.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LIMIT
        )
        assert answer == tuple(expected[0, len(prompt) :].tolist())
        lengths.add(len(answer))
    stops = {answer[-1] in policy.stop_ids for answer in answers}
    assert stops == {True, False}
    assert len(lengths) > 1


def test_logps_are_those_of_the_whole_softmax_at_temperature_one(asked: tuple) -> None:
    policy, prompts, answers = asked
    logps = log_probs(policy.model.get_base_model(), prompts, answers)
    for prompt, answer, found in zip(prompts, answers, logps, strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            logits = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()
        expected = logits.log_softmax(dim=-1)[len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_fewer_prompts_are_answered_at_once_if_memory_runs_out(asked: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, prompts, answers = asked
    base, batches, done = policy.model.get_base_model(), [], []
    generate = base.generate

    def short(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        batches.append(len(input_ids))
        if len(input_ids) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(base, "generate", short)
    room = 4
    assert greedy(base, prompts, policy.stop_ids, LIMIT, done.append) == answers
    assert batches == [16, 8, 4, 4, 4, 4, 4, 4]
    assert sum(done) == len(prompts) == 24
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        greedy(base, prompts, policy.stop_ids, LIMIT)


def test_answers_are_scored_one_at_a_time(asked: tuple) -> None:
    policy, prompts, answers = asked
    base, shapes = policy.model.get_base_model(), []
    policy.trunk.register_forward_pre_hook(lambda *found: shapes.append(found[2]["input_ids"].shape), with_kwargs=True)
    log_probs(base, prompts, answers)
    assert shapes == [(1, len(prompt) + len(answer)) for prompt, answer in zip(prompts, answers, strict=True)]


def testparting() -> None:
    theirs, theirs_logps = (5, 6, 7), torch.tensor([-0.1, -0.9, -0.3])
    assert parting(theirs, theirs, theirs_logps, theirs_logps) is None
    assert parting(theirs, (5, 8), theirs_logps, torch.tensor([-0.1, -0.5])) == pytest.approx(0.4)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_what_rounding_explains(dtype: str) -> None:
    allowed = ROUNDING[dtype]
    refuse_beyond_rounding(dtype, mean=allowed, worst=50 * allowed, gap=50 * allowed)
    nan = float("nan")
    for mean, worst, gap in (
        (1.01 * allowed, 0, 0),
        (0, 51 * allowed, 0),
        (0, 0, 51 * allowed),
        (nan, 0, 0),
        (0, nan, 0),
        (0, 0, nan),
    ):
        with pytest.raises(ExportError):
            refuse_beyond_rounding(dtype, mean=mean, worst=worst, gap=gap)
