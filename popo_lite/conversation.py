"""Sample answers, or conversations with an environment: several answers of the model to what the environment says.

A conversation is one completion. Its tokens are those that were sampled and, between them, those of the environment's
messages. `Completion.loss_mask` tells them apart; only the model's own are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from popo_lite.distributed import Ranks
from popo_lite.grading import Grader
from popo_lite.recipe import Recipe
from popo_lite.samplers import Sampler, SamplingParams
from popo_lite.tasks.rendering import Renderer
from popo_lite.types import Completion, FinishReason, Problem, Prompt, Reward


@dataclass
class _Conversation:
    prompt: Prompt
    index: int
    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    sampler_logps: list[float] = field(default_factory=list)
    messages: list[Mapping[str, str]] = field(default_factory=list)
    finish_reason: FinishReason = FinishReason.STOP
    failed: Reward | None = None

    def add(self, token_ids: Sequence[int], role: str, text: str, logps: Sequence[float] = ()) -> None:
        self.token_ids += token_ids
        self.loss_mask += [role == "assistant"] * len(token_ids)
        self.sampler_logps += logps
        self.messages.append({"role": role, "content": text})

    def completion(self) -> Completion:
        return Completion(
            token_ids=tuple(self.token_ids),
            sampler_logps=tuple(self.sampler_logps),
            finish_reason=self.finish_reason,
            text=self.messages[-1]["content"],
            loss_mask=tuple(self.loss_mask),
            messages=tuple(self.messages),
            failed=self.failed,
        )


@dataclass(frozen=True, kw_only=True)
class RolloutWorker:
    """Samples answers, and grades them. Each of the `ranks` has one, and does a share of the prompts."""

    recipe: Recipe
    renderer: Renderer
    sampler: Sampler
    grader: Grader
    ranks: Ranks = field(default_factory=Ranks)

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        count: int,
        params: SamplingParams,
        policy_version: int,
        stream: tuple[int | str, ...],
        finished: Callable[[int], None],
        first_index: int = 0,
    ) -> list[list[Completion]]:
        """Return `count` completions for each prompt: see `Sampler.sample`. With `rollout.environment`, conversations.

        A conversation ends when the environment is done or fails, after `max_turns` answers, or if there is no room
        within `params.max_completion_length` for another answer. One that ends within an answer is truncated.
        """
        environment = self.recipe.rollout.environment
        if environment.name is None:
            return self.sampler.sample(
                prompts, count=count, first_index=first_index, params=params, policy_version=policy_version,
                stream=stream, finished=finished,
            )  # fmt: skip
        groups = [[_Conversation(prompt, first_index + i) for i in range(count)] for prompt in prompts]
        going = [conversation for group in groups for conversation in group]
        for turn in range(environment.max_turns):
            answers = self.sampler.draw(
                [
                    (
                        Prompt(problem=one.prompt.problem, token_ids=(*one.prompt.token_ids, *one.token_ids)),
                        one.index,
                        params.max_completion_length - len(one.token_ids),
                    )
                    for one in going
                ],
                params=params,
                policy_version=policy_version,
                stream=(*stream, "turn", turn) if turn else stream,
                finished=lambda _: finished(0),  # conversations are counted, not answers
            )
            for one, answer in zip(going, answers, strict=True):
                one.add(answer.token_ids, "assistant", answer.text, answer.sampler_logps)
                one.finish_reason = answer.finish_reason
            before = len(going)
            going = [one for one in going if one.finish_reason is FinishReason.STOP]
            if turn + 1 == environment.max_turns:
                going = []
            observations = self.grader.observe([(one.messages, one.prompt.problem) for one in going])
            speaking = []
            for one, observation in zip(going, observations, strict=True):
                if isinstance(observation, Reward):
                    one.failed = observation
                if not isinstance(observation, str):
                    continue
                token_ids = self.renderer.observation_ids(one.token_ids[-1], observation)
                if len(one.token_ids) + len(token_ids) < params.max_completion_length:
                    one.add(token_ids, environment.role, observation)
                    speaking.append(one)
            going = speaking
            finished(before - len(going))
            if not going:
                break
        return [[conversation.completion() for conversation in group] for group in groups]

    def grade(self, completions: Sequence[tuple[Completion, Problem]], *, step: int) -> list[Reward]:
        """Return the rewards of completions, in order: see `Grader.grade`. TRL's functions get `step` of all steps."""
        answers = [one for one, _ in completions]
        rewards = self.grader.grade(
            [(one.text, problem) for one, problem in completions],
            completion_ids=[one.token_ids for one in answers],
            conversations=[one.messages for one in answers],
            trainer_state={"global_step": step, "max_steps": self.recipe.train.steps},
        )
        return [one.failed or reward for one, reward in zip(answers, rewards, strict=True)]
