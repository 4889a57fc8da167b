"""Turn problems into token ids with the tokenizer's or the recipe's chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from popo_lite.errors import DataError, ModelError
from popo_lite.recipe import Recipe
from popo_lite.types import Problem, Prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase


PROBE = "17 + 25\n= 42"
"""A tokenizer must decode this text unchanged: spaces and line breaks carry meaning in mathematics."""


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """Turn problems into prompts and token ids back into text."""

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None = None
    chat_template: str | None = None
    max_prompt_length: int

    def __post_init__(self) -> None:
        if not (self.chat_template or self.tokenizer.chat_template):
            raise ModelError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no chat template",
                where="data.chat_template",
                next_step="set data.chat_template to a Jinja template (popo-lite eval: --chat-template FILE), for a "
                'base model for instance "{% for m in messages %}{{ m.content }}\\n{% endfor %}"',
            )
        if not keeps_text(self.tokenizer):
            raise ModelError(
                f"the tokenizer of {self.tokenizer.name_or_path}, loaded as {type(self.tokenizer).__name__}, loses "
                "spaces or line breaks",
                where="model.id",
                next_step="mathematics cannot be asked through it; use another model",
            )

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        """Return the renderer for `recipe`."""
        return cls(
            tokenizer=tokenizer,
            system_prompt=recipe.data.system_prompt,
            chat_template=recipe.data.chat_template,
            max_prompt_length=recipe.rollout.max_prompt_length,
        )

    def token_ids(self, problem: Problem) -> tuple[int, ...]:
        """Return the problem's token ids with the generation prompt, without a length limit."""
        messages: list[dict[str, Any]] = [dict(message) for message in problem.messages]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        try:
            ids = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except TemplateError as error:
            raise ModelError(
                f"the chat template does not take the roles {', '.join(message['role'] for message in messages)}: "
                f"{error}",
                where="data.chat_template" if self.chat_template else f"the tokenizer of {self.tokenizer.name_or_path}",
                next_step='leave out data.system_prompt (popo-lite eval: --system-prompt "") where it is the system '
                "message, or set data.chat_template (popo-lite eval: --chat-template FILE) to one that takes them",
            ) from error
        return tuple(cast("list[int]", ids))

    def fits(self, problem: Problem) -> bool:
        """Check that the rendered problem is within `max_prompt_length`."""
        return len(self.token_ids(problem)) <= self.max_prompt_length

    def render(self, problem: Problem) -> Prompt:
        """Return the prompt of `problem`. Raises DataError if it is longer than `max_prompt_length`."""
        ids = self.token_ids(problem)
        if len(ids) > self.max_prompt_length:
            raise DataError(
                f"its prompt has {len(ids)} tokens, the limit is rollout.max_prompt_length = {self.max_prompt_length}",
                where=f"problem {problem.id}",
                next_step=f"--set rollout.max_prompt_length={len(ids)}, or --set data.overlong_prompts=skip",
            )
        return Prompt(problem=problem, token_ids=ids)

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of a completion without special tokens."""
        return cast("str", self.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def keeps_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Check that the tokenizer keeps spaces and line breaks.

    transformers 5 takes byte-level tokenizers that are registered as LlamaTokenizer, DeepSeek's among them, for
    SentencePiece ones and replaces their pre-tokenizer, silently (huggingface/transformers issue 48206).
    """
    return str(tokenizer.decode(tokenizer.encode(PROBE, add_special_tokens=False))).strip() == PROBE
