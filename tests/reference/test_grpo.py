"""GRPO against TRL's own trainer on identical tensors: loss and gradient of every adapter weight, float32."""

from __future__ import annotations

import itertools

import pytest
import torch
import trl

from popo_lite.objective import group_advantages
from popo_lite.policy.policy import load_policy
from popo_lite.types import Completion, FinishReason, Group, Outcome, Problem, Prompt, Reward, Rollout
from popo_lite.update import Learner

G, PROMPTS, LONGEST = 4, 3, 14
REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.2, 0.9, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0]]


def rollouts_of(policy):
    """Random answers of unequal lengths, with sampler log-probs far enough from the policy's to clip both ways."""
    torch.manual_seed(11)
    found = []
    for number in range(PROMPTS):
        problem = Problem(id=str(number), messages=({"role": "user", "content": "?"},), answer="1")
        prompt = Prompt(problem=problem, token_ids=tuple(torch.randint(5, 300, (4 + 2 * number,)).tolist()))
        answers = []
        for index in range(G):
            tokens = torch.randint(5, 300, (LONGEST - 3 * index - number,)).tolist()
            ids = torch.tensor([*prompt.token_ids, *tokens])
            with torch.no_grad():
                z = policy.head.logits(policy.hidden_states(ids, [[len(ids)]])[len(prompt.token_ids) - 1 : -1])
            logps = torch.log_softmax(z, dim=-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
            answers.append((tuple(tokens), tuple((logps + 0.4 * torch.randn(len(tokens))).tolist())))
        found.append((prompt, answers))
    return found


def groups_of(found):
    return [
        Group(
            rollouts=tuple(
                Rollout(
                    prompt=prompt,
                    completion=Completion(
                        token_ids=tokens, sampler_logps=logps, finish_reason=FinishReason.STOP, text=""
                    ),
                    reward=Reward(value=(r := REWARDS[number][index]), outcome=Outcome.CORRECT, positive=r > 0.5),
                    policy_version=0,
                    index=index,
                )
                for index, (tokens, logps) in enumerate(answers)
            )
        )
        for number, (prompt, answers) in enumerate(found)
    ]


def padded(rows, side):
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    return torch.tensor([[*pad, *row] if side == "left" else [*row, *pad] for row, pad in zip(rows, fill, strict=True)])


def advantages_by_trl(scaling):
    """The two lines of GRPOTrainer that make advantages, with its own nanstd."""
    from trl.trainer.utils import nanstd

    rewards = torch.tensor(REWARDS)
    advantages = rewards - rewards.nanmean(dim=1, keepdim=True)
    return (advantages / (nanstd(rewards, dim=1)[:, None] + 1e-4) if scaling == "group" else advantages).flatten()


@pytest.mark.parametrize("scaling", ["group", "none"])
def test_advantages_are_trls(scaling):
    ours = list(itertools.chain.from_iterable(group_advantages(row, scaling) for row in REWARDS))
    torch.testing.assert_close(torch.tensor(ours), advantages_by_trl(scaling), rtol=1e-6, atol=1e-7)


def test_an_ungraded_answer_has_no_advantage_and_does_not_move_the_mean():
    assert group_advantages([1.0, None, 0.0], "none") == [0.5, 0.0, -0.5]
    assert group_advantages([1.0, None, None], "group") == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("scaling", ["group", "none"])
@pytest.mark.parametrize(("clip", "temperature"), [((0.2, 0.2), 1.0), ((0.1, 0.35), 0.6)])
@pytest.mark.parametrize(("kl", "correction"), [(0.0, True), (0.3, True), (0.3, False)])
def test_loss_and_gradient_are_trls(tiny_recipe, tmp_path, loss_type, scaling, clip, temperature, kl, correction):
    recipe = tiny_recipe(
        'model.quantization="none"',  # TRL rounds the adapters of a 4-bit model to 16 bit
        "objective.algorithm=grpo", f"objective.scale_rewards={scaling}", f"objective.kl_coef={kl}",
        f"objective.loss_type={loss_type}", f"objective.epsilon={clip[0]}",
        f"objective.epsilon_high={clip[1]}", f"rollout.temperature={temperature}", "rollout.max_completion_length=16",
        "optimizer.max_grad_norm=1e30",
        *([f"objective.use_bias_correction_kl={str(correction).lower()}"] if kl else []),
    )  # fmt: skip
    policy = load_policy(recipe)
    torch.manual_seed(2)
    with torch.no_grad():
        for _, parameter in policy.adapter_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    found = rollouts_of(policy)
    learner = Learner(recipe, policy, notify=pytest.fail, memory_advice=pytest.fail)
    plan = learner.plan(groups_of(found))
    reference_logps = learner.reference_logps(plan)
    result = learner.backward(plan, None, reference_logps, entropy_coef=0.0, progress=lambda _: None)
    ours = {name: p.grad.clone() for name, p in policy.adapter_parameters()}
    ratios = torch.cat(result.log_ratios).exp()
    assert bool((ratios > 1 + clip[1]).any())
    assert bool((ratios < 1 - clip[0]).any())
    # Without a KL term a group of equal rewards moves nothing, and is not forwarded; in the normalisers it counts.
    assert len(plan.sequences) == G * (PROMPTS if kl else PROMPTS - 1)

    config = trl.GRPOConfig(
        output_dir=str(tmp_path), loss_type=loss_type, scale_rewards=scaling, beta=kl,
        epsilon=clip[0], epsilon_high=clip[1], max_completion_length=16, num_generations=G,
        per_device_train_batch_size=G * PROMPTS, gradient_accumulation_steps=1, use_cpu=True, bf16=False,
        report_to=[], gradient_checkpointing=False, temperature=temperature, disable_dropout=False,
        use_bias_correction_kl=correction,
    )  # fmt: skip
    import datasets

    trainer = trl.GRPOTrainer(
        model=policy.model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["?"] * G}),
        processing_class=policy.tokenizer,
    )

    def logps_and_entropies(model, input_ids, attention_mask, logits_to_keep, **_):
        """Plain torch in the place of TRL's, which needs a GPU for its kernels: what is compared is the loss."""
        ids, mask = input_ids, attention_mask
        place = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=place).logits[:, -logits_to_keep - 1 : -1]
        every = torch.log_softmax(logits / temperature, dim=-1)
        logps = every.gather(-1, ids[:, -logits_to_keep:, None])[..., 0]
        return logps, -(every.exp() * every).sum(-1).detach(), None

    trainer._get_per_token_logps_and_entropies = logps_and_entropies
    flat = [(prompt, *answer) for prompt, answers in found for answer in answers]
    lengths = [len(tokens) for _, tokens, _ in flat]
    inputs = {
        "prompt_ids": padded([prompt.token_ids for prompt, _, _ in flat], "left"),
        "prompt_mask": padded([[1] * len(prompt.token_ids) for prompt, _, _ in flat], "left"),
        "completion_ids": padded([tokens for _, tokens, _ in flat], "right"),
        "completion_mask": padded([[1] * length for length in lengths], "right"),
        "advantages": advantages_by_trl(scaling),
        "old_per_token_logps": padded([logps for _, _, logps in flat], "right"),
        "num_items_in_batch": torch.tensor(sum(lengths)),
    }
    if kl:
        inputs["ref_per_token_logps"] = padded([part.tolist() for part in reference_logps], "right")
        with torch.no_grad(), policy.model.disable_adapter():
            reference, *_ = logps_and_entropies(
                policy.model,
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                inputs["completion_ids"].shape[1],
            )
        real = inputs["completion_mask"].bool()
        torch.testing.assert_close(inputs["ref_per_token_logps"][real], reference[real], rtol=1e-5, atol=1e-5)
    policy.model.zero_grad(set_to_none=True)
    policy.model.train()
    trainer.current_gradient_accumulation_steps = 1
    theirs = trainer._compute_loss(policy.model, inputs)
    theirs.backward()
    assert result.sums["loss"] == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
    scale = max(float(p.grad.abs().max()) for _, p in policy.adapter_parameters())
    assert scale > 1e-4
    # In float32: we add up the answers of a prompt together, TRL pads and adds up whole sequences.
    for name, parameter in policy.adapter_parameters():
        torch.testing.assert_close(ours[name] / scale, parameter.grad / scale, rtol=1e-4, atol=5e-6)
