"""Turn problems into token ids with the tokenizer's or the recipe's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from jinja2 import TemplateError

from popo_lite.errors import DataError, ModelError
from popo_lite.recipe import Recipe
from popo_lite.types import Problem, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Renderer:
    """Turn problems into prompts and token ids back into text. Raises ModelError if the tokenizer cannot do it."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.max_prompt_length = tokenizer, recipe.rollout.max_prompt_length
        self.system_prompt, self.chat_template = recipe.data.system_prompt, recipe.data.chat_template
        if not (self.chat_template or tokenizer.chat_template):
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template",
                where="data.chat_template",
                next_step="set data.chat_template to a Jinja template (popo-lite eval: --chat-template FILE), for a "
                'base model for instance "{% for m in messages %}{{ m.content }}\\n{% endfor %}"',
            )
        if not keeps_text(tokenizer):
            name = f"{tokenizer.name_or_path}, loaded as {type(tokenizer).__name__},"
            what = f"the tokenizer of {name} loses spaces or line breaks, so mathematics cannot be asked through it"
            raise ModelError(what, where="model.id", next_step="use another model")

    def token_ids(self, problem: Problem) -> tuple[int, ...]:
        """Return the problem's token ids with the generation prompt, without a length limit."""
        messages = [*map(dict, problem.messages)]
        if self.system_prompt is not None:
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        try:
            ids = self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ModelError(
                f"the chat template does not take the roles {roles}: {error}",
                where="data.chat_template" if self.chat_template else f"the tokenizer of {self.tokenizer.name_or_path}",
                next_step='leave out data.system_prompt (popo-lite eval: --system-prompt "") if it is the system '
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
    """Check that the tokenizer keeps spaces and line breaks, which carry meaning in mathematics.

    transformers 5 takes byte-level tokenizers that are registered as LlamaTokenizer, DeepSeek's among them, for
    SentencePiece ones and replaces their pre-tokenizer, silently (huggingface/transformers issue 48206).
    """
    probe = "17 + 25\n= 42"
    return str(tokenizer.decode(tokenizer.encode(probe, add_special_tokens=False))).strip() == probe
