"""What must not change an update: how it is cut into micro-batches, the order of groups, prompts without a positive,
and whose log-probs made the weights where they agree.

These run in float64 from end to end, on a Phi (its norms keep float64, those of Llama and Qwen pass through float32),
so that only the order of sums may differ.
"""

from __future__ import annotations

import pytest
import torch
import transformers

from popo_lite.console.views import SilentView
from popo_lite.policy.tiny_model import TINY_FOLDER
from popo_lite.training.loop import Trainer
from popo_lite.training.metrics import StageClock
from popo_lite.types import Completion, FinishReason, Group, Outcome, Prompt, Reward, Rollout


@pytest.fixture(scope="module")
def phi(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phi")
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(
        transformers.PhiConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            eos_token_id=1,
            pad_token_id=0,
            bos_token_id=None,
        )
    )
    for parameter in model.parameters():
        parameter.data *= 4  # distributions far from uniform
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TINY_FOLDER).save_pretrained(folder)
    return folder


@pytest.fixture
def trainer(phi, tiny_recipe):
    opened = []

    def make(*overrides: str) -> Trainer:
        recipe = tiny_recipe(
            f'model.id="{phi}"', 'model.quantization="none"', 'model.dtype="float64"', "eval.problems=0",
            "objective.beta=0.05", "train.tokens_per_microbatch=1000000", *overrides,
        )  # fmt: skip
        found = Trainer(recipe, SilentView())
        opened.append(found)
        torch.manual_seed(4)
        with torch.no_grad():
            for _, parameter in found.policy.adapter_parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, dtype=parameter.dtype))
            # As if training had gone on for a while: the siamese is elsewhere.
            for average in found.learner.siamese.state()[0].values():
                average.add_(0.05 * torch.randn(average.shape, dtype=average.dtype))
        return found

    yield make
    for one in opened:
        one.__exit__()


def groups_of(trainer: Trainer, *, hopeless: int = 1) -> list[Group]:
    """Five prompts with 1, 3, 4, 2 and 4 of 4 right, answers of very different lengths, and `hopeless` without any."""
    torch.manual_seed(7)
    groups = []
    for number, right in enumerate([1, 3, 4, 2, 4] + [0] * hopeless):
        problem = trainer.train_task.train_problem(0, number)
        prompt = Prompt(problem=problem, token_ids=trainer.renderer.token_ids(problem))
        rollouts = []
        for index in range(4):
            length = 3 + 7 * index + 5 * number
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    completion=Completion(
                        token_ids=tuple(torch.randint(5, 300, (length,)).tolist()),
                        sampler_logps=tuple((-torch.rand(length, dtype=torch.float64)).tolist()),
                        finish_reason=FinishReason.STOP,
                        text="",
                    ),
                    reward=Reward(value=float(index < right), outcome=Outcome.CORRECT),
                    policy_version=0,
                    index=index,
                )
            )
        groups.append(Group(rollouts=tuple(rollouts)))
    return groups


def update(trainer: Trainer, groups: list[Group]) -> dict[str, torch.Tensor]:
    """The stages from credit to backward of one step; the gradients, and the loss as `loss`."""
    plan = trainer.learner.credit(groups)
    batches = trainer.learner.collate([sequence.rollout for sequence in plan.sequences])
    targets = trainer.learner.siamese_targets(0, plan, batches)
    clip, trainer.recipe.optimizer.__dict__["max_grad_norm"] = trainer.recipe.optimizer.max_grad_norm, 1e30
    figures = trainer.learner.backward(plan, batches, targets, beta=trainer.cursor.beta, advance=lambda _: None)
    trainer.recipe.optimizer.__dict__["max_grad_norm"] = clip
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in trainer.policy.trainable_parameters()
    }
    trainer.learner.optimizer.zero_grad(set_to_none=True)
    assert figures.grad_norm > 0
    return {**found, "loss": torch.tensor(figures.loss, dtype=torch.float64)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    norm = torch.stack([tensor.norm() for name, tensor in expected.items() if name != "loss"]).norm()
    for name, tensor in expected.items():
        scale = float(norm) if name != "loss" else 1.0
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-9, atol=1e-12 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


VARIANTS = [
    (),
    ('objective.target="features"',),
    ('objective.entropy_over="all"',),
    ('objective.normalizer="sequence_mean"', "objective.alpha=0"),
    ('objective.normalizer="reference"',),
    ('objective.normalizer="sequence_sum"', "rollout.max_completion_tokens=30"),
    ('objective.weights_from="trainer"', 'objective.weights="sequence_logprob"'),
    ("rollout.temperature=0.7",),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_batch_of_all_equals_one_at_a_time(trainer, variant):
    whole = trainer(*variant)
    groups = groups_of(whole)
    expected = update(whole, groups)
    for budget in (70, 128, 200):
        cut = trainer(*variant, f"train.tokens_per_microbatch={budget}", "rollout.max_prompt_tokens=30",
                      "rollout.max_completion_tokens=30", "train.logits_chunk_tokens=7")  # fmt: skip
        assert len(cut.learner.collate([r for group in groups for r in group.rollouts])) > 3
        assert_same(update(cut, groups), expected)


@pytest.mark.parametrize("variant", VARIANTS[:3])
def test_the_order_of_groups_changes_nothing(trainer, variant):
    one = trainer(*variant, "train.tokens_per_microbatch=200")
    groups = groups_of(one)
    assert_same(update(one, groups[::-1]), update(one, groups))


def test_prompts_without_a_positive_contribute_nothing(trainer):
    one = trainer()
    assert_same(update(one, groups_of(one, hopeless=3)), update(one, groups_of(one, hopeless=0)))


def test_negatives_matter_only_where_asked(trainer):
    """The control of the test above: with the entropy of all rollouts they do contribute."""
    one = trainer('objective.entropy_over="all"')
    some, none = update(one, groups_of(one, hopeless=3)), update(one, groups_of(one, hopeless=0))
    assert abs(some["loss"] - none["loss"]) > 1e-4


def test_weights_from_sampler_and_trainer_agree_where_their_logps_do(trainer):
    by_sampler, by_trainer = trainer(), trainer('objective.weights_from="trainer"')
    groups = groups_of(by_sampler)
    flat = [rollout for group in groups for rollout in group.rollouts]
    exact = dict(
        zip(((r.prompt.problem.id, r.index) for r in flat), by_trainer.learner._policy_mean_logps(flat), strict=True)
    )
    honest = [
        Group(
            rollouts=tuple(
                Rollout(
                    prompt=r.prompt,
                    completion=Completion(
                        token_ids=r.completion.token_ids,
                        sampler_logps=(exact[r.prompt.problem.id, r.index],) * len(r.completion.token_ids),
                        finish_reason=r.completion.finish_reason,
                        text="",
                    ),
                    reward=r.reward,
                    policy_version=0,
                    index=r.index,
                )
                for r in group.rollouts
            )
        )
        for group in groups
    ]
    assert_same(update(by_sampler, honest), update(by_trainer, honest))


def test_the_update_is_the_gradient_of_the_formula(trainer):
    """One step against docs/method.md written out naively: full logits, one sequence at a time, plain autograd."""
    one = trainer("train.tokens_per_microbatch=200")
    groups = groups_of(one)
    found = update(one, groups)
    recipe, policy = one.recipe, one.policy
    plan = one.learner.credit(groups)
    total = torch.zeros((), dtype=torch.float64)
    lengths = [len(r.completion.token_ids) for group in groups for r in group.positives(0.5)]
    mean_length = sum(lengths) / len(lengths)
    with_positive = [group for group in groups if group.positives(0.5)]
    similarity, weight_sum, entropy = 0.0, 0.0, 0.0
    batches = {s.rollout.prompt.problem.id + str(s.rollout.index): i for i, s in enumerate(plan.sequences)}
    for group in with_positive:
        positives = group.positives(0.5)
        means = [sum(r.completion.sampler_logps) / len(r.completion.token_ids) for r in positives]
        weights = torch.softmax(torch.tensor(means, dtype=torch.float64), dim=0)
        for rollout, weight in zip(positives, weights, strict=True):
            prompt, answer = rollout.prompt.token_ids, rollout.completion.token_ids
            tokens = torch.tensor([prompt + answer])
            mask = torch.ones_like(tokens)
            output = policy.model(input_ids=tokens, output_hidden_states=True)
            logp = torch.log_softmax(output.logits[0, len(prompt) - 1 : -1], dim=-1)
            total = total - weight * logp.gather(1, torch.tensor(answer)[:, None]).sum() / (
                len(with_positive) * mean_length
            )
            entropy = entropy - (logp.exp() * logp).sum() / sum(lengths)
            feature = output.hidden_states[-1][0, len(prompt) :].mean(dim=0)
            with torch.no_grad(), one.learner.siamese.swapped():
                hidden = policy.hidden_states(tokens, mask)[0, len(prompt) :].mean(dim=0)
                q = policy.predictor(hidden[None])[0]
            noise = one.learner._noise(0, plan, batches[rollout.prompt.problem.id + str(rollout.index)], q)
            q = q + 0.02 * q.square().mean().sqrt() * noise
            p = policy.predictor(feature[None])[0]
            similarity = similarity + weight * (1 - p @ q / (p.norm() * q.norm()))
            weight_sum += float(weight)
    total = total + recipe.objective.alpha * similarity / weight_sum - recipe.objective.beta * entropy
    assert weight_sum == pytest.approx(len(with_positive))
    total.backward()
    expected = {name: p.grad for name, p in policy.trainable_parameters()}
    assert_same(found, {**expected, "loss": total.detach()})


def test_a_step_without_positives_changes_nothing_and_says_so(tiny_recipe, tmp_path):
    from popo_lite.run_folder import RunFolder

    recipe = tiny_recipe('reward.function="math"', "eval.problems=0", "data.prompts_per_step=2",
                         "rollout.group_size=2", "rollout.max_completion_tokens=1")  # fmt: skip
    with Trainer(recipe, SilentView()) as trainer:
        trainer.run_folder = RunFolder(tmp_path)
        before = {name: p.detach().clone() for name, p in trainer.policy.trainable_parameters()}
        trainer.train_step(0)
        assert all(torch.equal(p, before[name]) for name, p in trainer.policy.trainable_parameters())
        assert trainer.policy.version == 0
        assert trainer.cursor.next_step == 1
        assert trainer.learner.siamese.drift() == 0.0
    (line,) = trainer.run_folder.metrics_path.read_text().splitlines()
    assert '"skipped_reason": "no prompt had a positive"' in line
    assert '"loss": null' in line


def test_the_clock_tells_the_view(tiny_recipe):
    told = []
    view = SilentView()
    view.stage = lambda name, *, total=None: told.append((name, total))
    clock = StageClock(view, lambda: None)
    with clock("rollout", total=3):
        pass
    assert told == [("rollout", 3)]
    assert set(clock.seconds) == {"rollout"}
