"""Turn problems into token ids with the tokenizer's or the recipe's chat template."""

from __future__ import annotations

import signal
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date, datetime, time
from functools import cached_property
from typing import TYPE_CHECKING, cast

from jinja2 import TemplateError

from popo_lite.errors import DataError, ModelError
from popo_lite.recipe import Recipe
from popo_lite.types import Problem, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BASE_TEMPLATE = r"{% for m in messages %}{{ m.content }}\n{% endfor %}"
"""A chat template for a base model, as TOML writes it between quotes."""

TEMPLATE_SECONDS = 20.0
"""Longest time to apply a chat template to one conversation. It takes less than a millisecond."""


class TakesTooLongError(BaseException):
    """Raised while a template is applied. No Exception: Jinja catches these as it computes constants."""


@contextmanager
def applying_template() -> Iterator[None]:
    """Turn whatever a chat template raises into a TemplateError, and end one that does not end.

    It comes with the model or the recipe. Jinja's sandbox keeps it from reaching anything, but lets it loop for years.
    Only the main thread, and not on Windows, can be interrupted.
    """

    def stop(*_: object) -> None:
        raise TakesTooLongError

    limited = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, stop) if limited else None
    try:
        if limited:
            # Again and again: something may still catch it.
            signal.setitimer(signal.ITIMER_REAL, TEMPLATE_SECONDS, TEMPLATE_SECONDS)
        yield
    except TemplateError:
        raise
    except TakesTooLongError as error:
        raise TemplateError(f"applying it takes more than {TEMPLATE_SECONDS:g} seconds") from error
    except Exception as error:  # such as a range that is too long, or a division by 0
        raise TemplateError(f"{type(error).__name__}: {error}") from error
    finally:
        if limited:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class Renderer:
    """Turn problems into prompts and token ids back into text. Raises ModelError if the tokenizer cannot do it.

    `embeddings` is the number of rows of the model's embedding, if it is known. `stop_ids` end answers; if they are
    not given, the tokenizer's EOS does.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        embeddings: int | None = None,
        stop_ids: Collection[int] = (),
    ) -> None:
        self.tokenizer, self.max_prompt_length = tokenizer, recipe.rollout.max_prompt_length
        self.system_prompt, self.chat_template = recipe.data.system_prompt, recipe.data.chat_template
        environment = recipe.rollout.environment
        self._role, self._converses = environment.role, environment.name is not None
        self._embeddings, self._stop_ids = embeddings, stop_ids
        self._thinking_tags, self._keep_special_tokens = recipe.reward.thinking_tags, recipe.reward.keep_special_tokens
        self._day = datetime.combine(recipe.data.date or date.today(), time())
        if not (self.chat_template or tokenizer.chat_template):
            bos = "{{ bos_token }}" if puts_bos(tokenizer) else ""
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template",
                where="data.chat_template",
                next_step="set data.chat_template to a Jinja template (popo-lite eval: --chat-template FILE), for a "
                f"base model for instance --set 'data.chat_template=\"{bos}{BASE_TEMPLATE}\"'",
            )
        if not keeps_text(tokenizer):
            name = f"{tokenizer.name_or_path}, loaded as {type(tokenizer).__name__},"
            what = f"the tokenizer of {name} loses spaces or line breaks, so mathematics cannot be asked through it"
            raise ModelError(what, where="model.id", next_step="use another model")

    def check(self, problem: Problem) -> str | None:
        """Return a warning if the prompt of `problem` begins otherwise than the tokenizer's texts do, or None.

        Raises ModelError if the chat template leaves out the question or the system prompt, or takes no conversation.
        """
        if self._converses:
            self.observation_ids(-1, "an observation")
        ids, messages = self.token_ids(problem), self._messages(problem)
        if ids == self._apply([*messages[:-1], {"role": "user", "content": f"{problem.question} 2"}]):
            raise self._refusal(f"the chat template leaves out the question of problem {problem.id}", "correct it")
        # Not against no system prompt at all: Qwen2.5-Math's template has the usual one as its default.
        if self.system_prompt is not None and ids == self._apply(
            [{"role": "system", "content": f"{self.system_prompt} 2"}, *messages[1:]]
        ):
            next_step = "unset it (--set data.system_prompt=), or set data.chat_template to one that writes it"
            raise ModelError("the chat template leaves it out", where="data.system_prompt", next_step=next_step)
        bos, name = self.tokenizer.bos_token_id, self.tokenizer.bos_token
        if bos is not None and ids[:2] == (bos, bos):
            place = "data.chat_template" if self.chat_template else "the model's chat template"
            return f"prompts begin with {name} twice, once is usual; {place} or data.system_prompt writes it again"
        if puts_bos(self.tokenizer) and ids[0] != bos:
            return (
                f"prompts do not begin with {name}, as other texts of this tokenizer do; if the model was trained with "
                "it, begin data.chat_template with {{ bos_token }}"
            )
        return None

    def token_ids(self, problem: Problem) -> tuple[int, ...]:
        """Return the problem's token ids with the generation prompt, without a length limit."""
        messages = self._messages(problem)
        try:
            ids = self._apply(messages)
        except TemplateError as error:
            raise self._refused_roles(problem, messages, error) from error
        largest = max(ids, default=0)
        if self._embeddings is not None and largest >= self._embeddings:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise ModelError(
                f"its prompt holds {token} (id {largest}), and the model's embedding has {self._embeddings} rows",
                where=f"problem {problem.id}",
                next_step="use the tokenizer that the model was trained with; if the token comes from the chat "
                "template, set data.chat_template to one without it",
            )
        return ids

    def _messages(self, problem: Problem) -> list[dict[str, str]]:
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        return [*system, *map(dict, problem.messages)]

    def _apply(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        with applying_template():
            ids = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                strftime_now=self._day.strftime,  # in place of today's, which changes while a run is stopped
            )
        return tuple(cast("list[int]", ids))

    def _refused_roles(self, problem: Problem, messages: list[dict[str, str]], error: Exception) -> ModelError:
        """Return the error for messages that the template refuses: because of the system prompt, or of the row."""
        roles = ", ".join(message["role"] for message in messages)
        with suppress(TemplateError):
            if self.system_prompt is not None:
                self._apply([*map(dict, problem.messages)])
                what = f"the chat template takes no system prompt in front of this problem (roles {roles}): {error}"
                next_step = 'unset it (--set data.system_prompt=; popo-lite eval: --system-prompt ""), or set '
                next_step += "data.chat_template to one that writes it into the question"
                return ModelError(what, where="data.system_prompt", next_step=next_step)
        return self._refusal(
            f"the chat template does not take the roles {roles} of problem {problem.id}: {error}",
            "correct the messages of that row, or set data.chat_template to one that takes them",
        )

    def _refusal(self, what: str, next_step: str) -> ModelError:
        where = "data.chat_template" if self.chat_template else f"the tokenizer of {self.tokenizer.name_or_path}"
        return ModelError(what, where=where, next_step=f"{next_step} (popo-lite eval: --chat-template FILE)")

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

    @cached_property
    def opens_thinking(self) -> bool:
        """True if the generation prompt ends with the opening thinking tag, so that answers start inside it."""
        with suppress(TemplateError):  # of a template that refuses this; `check` says why
            prompt = self.tokenizer.decode(list(self._apply([{"role": "user", "content": "?"}])))
            return str(prompt).rstrip().endswith(self._thinking_tags[0])
        return False

    @cached_property
    def _left_out(self) -> frozenset[int] | None:
        """Ids that texts lack; None for all special tokens."""
        tokenizer = self.tokenizer
        ends = {tokenizer.pad_token_id, tokenizer.eos_token_id, *self._stop_ids} - {None}
        if self._keep_special_tokens:
            return frozenset(ends)
        added = tokenizer.added_tokens_decoder
        special = {i for i, token in added.items() if token.special} | {*tokenizer.all_special_ids}
        # Not `convert_tokens_to_ids`: for a tag that it lacks, Qwen's tokenizer returns <|endoftext|>.
        tags = {i for i, token in added.items() if token.content in self._thinking_tags}
        return frozenset(special - tags) if special & tags else None

    def observation_ids(self, last_token: int, observation: str) -> tuple[int, ...]:
        """Return the token ids of what an environment says after an answer that ended with `last_token`.

        They are what the chat template writes between the text of the answer and that of the next one. The template
        is not applied to the conversation itself: it may change earlier answers, and their tokens must stay.
        Raises ModelError if the template does not take such a conversation.
        """
        answer = "the answer, which is replaced"
        messages = [
            {"role": "user", "content": "the question"},
            {"role": "assistant", "content": answer},
            {"role": self._role, "content": observation},
        ]
        try:
            with applying_template():
                text = str(
                    self.tokenizer.apply_chat_template(
                        messages, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
                    )
                )
        except TemplateError as error:
            raise self._no_conversation(str(error)) from error
        following = text.partition(answer)[2]
        ids = self.tokenizer.encode(following, add_special_tokens=False)
        if observation.strip() not in following or not ids:
            raise self._no_conversation(f"it leaves out the role {self._role}")
        return tuple(ids[1:] if ids[0] == last_token else ids)

    def _no_conversation(self, reason: str) -> ModelError:
        next_step = 'set rollout.environment.role to "user", or data.chat_template to one that takes conversations'
        what = f"the chat template takes no conversation with an environment: {reason}"
        return ModelError(what, where="rollout.environment", next_step=next_step)

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of a completion without special tokens, but with thinking tags.

        With `reward.keep_special_tokens`, only padding and what ends an answer are left out.
        """
        if self._left_out is None:
            return cast("str", self.tokenizer.decode(list(token_ids), skip_special_tokens=True))
        return cast("str", self.tokenizer.decode([token for token in token_ids if token not in self._left_out]))


def puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Check whether the tokenizer puts BOS in front of a text."""
    return tokenizer.bos_token_id is not None and tokenizer.encode("1")[:1] == [tokenizer.bos_token_id]


def keeps_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Check that the tokenizer keeps spaces and line breaks, which carry meaning in mathematics.

    transformers 5 takes byte-level tokenizers that are registered as LlamaTokenizer, DeepSeek's among them, for
    SentencePiece ones and replaces their pre-tokenizer, silently (huggingface/transformers issue 48206).
    """
    probe = "17 + 25\n= 42"
    return str(tokenizer.decode(tokenizer.encode(probe, add_special_tokens=False))).strip() == probe
