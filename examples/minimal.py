"""POPO in one loop, over popo-lite's parts: sample, grade, weigh, fused loss, siamese.

    python examples/minimal.py [STEPS]

It trains the built-in toy model on sums, like `popo-lite train tiny_cpu`, one answer at a time and without
checkpoints. `popo_lite.train` does the same with micro-batches, resume, evaluation and vLLM.
"""

from __future__ import annotations

import sys

import torch

from popo_lite import load_recipe
from popo_lite.fused import fused_loss
from popo_lite.grading import Grader
from popo_lite.objective import StepPlan, Tokens, noisy_target, plan_step, popo, similarity_loss
from popo_lite.policy.policy import Policy, load_policy
from popo_lite.policy.siamese import Siamese
from popo_lite.samplers import Sampler, SamplingParams, open_sampler
from popo_lite.tasks import Task, open_tasks
from popo_lite.tasks.rendering import Renderer
from popo_lite.types import Group, Rollout


def sample_and_grade(
    step: int, task: Task, renderer: Renderer, sampler: Sampler, grader: Grader, policy: Policy
) -> list[Group]:
    """Return 16 groups of 8 graded answers."""
    problems = [task.train_problem(0, 16 * step + index) for index in range(16)]
    prompts = [renderer.render(problem) for problem in problems]
    answers = sampler.sample(
        prompts,
        count=8,
        params=SamplingParams(temperature=1.0, max_completion_length=48),
        policy_version=policy.version,
        stream=("rollout", step),
    )
    groups = []
    for prompt, completions in zip(prompts, answers, strict=True):
        rewards = grader.grade([(answer.text, prompt.problem) for answer in completions])
        groups.append(
            Group(
                rollouts=tuple(
                    Rollout(prompt=prompt, completion=answer, reward=reward, policy_version=policy.version, index=index)
                    for index, (answer, reward) in enumerate(zip(completions, rewards, strict=True))
                )
            )
        )
    return groups


def forward(policy: Policy, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the hidden states [N, D] that predict the answer, and the mean feature [1, D] of the answer."""
    start = len(rollout.prompt.token_ids)
    ids = torch.tensor(rollout.prompt.token_ids + rollout.completion.token_ids, device=policy.device)
    hidden = policy.hidden_states(ids, [[len(ids)]])
    return hidden[start - 1 : -1], hidden[start:].float().mean(dim=0, keepdim=True)


@torch.no_grad()
def siamese_targets(policy: Policy, siamese: Siamese, plan: StepPlan, sigma: float) -> list[torch.Tensor]:
    """Return the similarity term's target [1, D] of each answer, by the averaged weights."""
    targets = []
    with siamese.swapped():
        for sequence in plan.sequences:
            target = policy.predictor(forward(policy, sequence.rollout)[1])
            targets.append(noisy_target(target, torch.randn_like(target), sigma))
    return targets


def main(steps: int) -> None:
    """Train for `steps` steps and print the fraction of right answers."""
    torch.manual_seed(0)
    recipe = load_recipe("tiny_cpu")
    objective = recipe.objective
    policy = load_policy(recipe)
    siamese = Siamese(policy.trainable_parameters(), recipe.siamese.tau)
    optimizer = torch.optim.AdamW([p for _, p in policy.trainable_parameters()], lr=recipe.optimizer.learning_rate)
    task, _ = open_tasks(recipe)
    renderer = Renderer(recipe, policy.tokenizer)
    with (
        Grader(recipe.grading) as grader,
        open_sampler(recipe, policy, text=renderer.text, notify=print) as sampler,
    ):
        for step in range(steps):
            groups = sample_and_grade(step, task, renderer, sampler, grader, policy)
            rollouts = [rollout for group in groups for rollout in group.rollouts]
            right = sum(rollout.reward.positive for rollout in rollouts) / len(rollouts)

            plan = plan_step(groups, objective, max_completion_length=48)  # weights and divisors of the positives
            if plan is None:
                print(f"step {step + 1}: no positive")
                continue
            targets = siamese_targets(policy, siamese, plan, objective.noise_sigma)
            total = 0.0
            for sequence, target in zip(plan.sequences, targets, strict=True):
                hidden, feature = forward(policy, sequence.rollout)
                answer = sequence.rollout.completion
                ones = torch.ones(len(answer.token_ids), device=policy.device)
                tokens = Tokens(
                    sampler_logps=torch.tensor(answer.sampler_logps, device=policy.device),
                    reference_logps=None,
                    weights=sequence.weight * ones,
                    divisors=sequence.divisor * ones,
                    entropy_weights=ones / plan.entropy_tokens,
                )
                loss = fused_loss(
                    hidden,
                    torch.tensor(answer.token_ids, device=policy.device),
                    policy.head,
                    lambda logps, entropies, part, tokens=tokens: popo(
                        logps, entropies, tokens.at(part), objective, objective.entropy_coef
                    ),
                ).loss
                similarity, _ = similarity_loss(
                    policy.predictor(feature), target, torch.tensor([sequence.weight / plan.prompts])
                )
                loss = loss + objective.similarity_coef * similarity
                loss.backward()  # gradients add up over the answers of the step
                total += loss.item()

            before = [parameter.detach().clone() for _, parameter in policy.trainable_parameters()]
            optimizer.step()
            optimizer.zero_grad()
            after = [parameter.detach() for _, parameter in policy.trainable_parameters()]
            siamese.update(float(torch.stack(torch._foreach_norm(torch._foreach_sub(after, before))).norm()))
            policy.version += 1
            sampler.sync(policy.version)
            print(f"step {step + 1}: {right:.1%} right, loss {total:.4f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
