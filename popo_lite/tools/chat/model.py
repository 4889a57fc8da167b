"""Open the weights to talk with, and stream answers by transformers' `generate`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from popo_lite.errors import UserInputError
from popo_lite.policy.load import load_config, load_tokenizer
from popo_lite.policy.merged import kept_weights
from popo_lite.policy.parts import context_of
from popo_lite.policy.policy import Policy
from popo_lite.policy.tokens import open_renderer
from popo_lite.recipe import VLLMRecipe
from popo_lite.samplers.base import not_finite
from popo_lite.tasks.rendering import BASE_TEMPLATE, Renderer, puts_bos
from popo_lite.tools.benchmarks.subject import Subject, open_model, open_run, task_run
from popo_lite.tools.console.output import notify
from popo_lite.trust import MODEL_CODE, refuse_untrusted

SHOW_SECONDS = 0.05
"""An answer is decoded at most this often while it grows."""
ALL_WEIGHTS = {"policy": "adapter", "siamese": "siamese"}
"""Name of a run's weights on the command line -> in `open_run`."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer to the tokens `prompt_ids`. `finish_reason` is "stop", "length" or "interrupted"."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str


class ChatModel:
    """A loaded model. `weights` names it with its adapter; `has_adapter` says that this can be switched off."""

    def __init__(self, subject: Subject, weights: str, renderer: Renderer, policy: Policy) -> None:
        self.name, self.recipe, self.weights, self.checkpoint = (
            subject.name,
            subject.recipe,
            weights,
            subject.checkpoint,
        )
        self.has_adapter = any(subject.adapters.values())
        self.renderer, self._policy = renderer, policy
        base: Any = policy.model.get_base_model()
        self._base, self.context = base, context_of(base.config)
        # `generate` takes what its own arguments leave open from here: penalties and filters that training had not.
        base.generation_config = GenerationConfig()
        self._caches: dict[bool, tuple[tuple[int, ...], Any]] = {}

    def label(self, adapter: bool) -> str:
        """Return the name of the weights with or without the adapter."""
        return self.weights if adapter else "base"

    def forget(self) -> None:
        """Free the KV caches."""
        self._caches.clear()

    @torch.no_grad()
    def answer(self, prompt_ids: Sequence[int], *, adapter: bool, temperature: float, max_tokens: int, seed: int,
               show: Callable[[str], object]) -> Answer:  # fmt: skip
        """Return the answer to `prompt_ids`; temperature 0 takes the likeliest token. Ctrl-C ends it early.

        `show` is called with the whole text so far while the answer grows.
        """
        prompt, token_ids = tuple(prompt_ids), list[int]()
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        stops = sorted(self._policy.stop_ids)
        config = GenerationConfig(**sampling, max_new_tokens=max_tokens, top_k=0, top_p=1.0, eos_token_id=stops,
                                  pad_token_id=stops[0], return_dict_in_generate=True)  # fmt: skip
        ids = torch.tensor([prompt], device=self._policy.device)
        known, cache = self._caches.pop(adapter, ((), None))
        if prompt[: len(known)] != known or len(known) == len(prompt):
            cache = None  # the template writes earlier turns in another way, or the conversation is another one
        torch.manual_seed(seed)
        try:
            with self._policy.precision(), nullcontext() if adapter else self._policy.model.disable_adapter():
                output = self._base.generate(
                    ids, attention_mask=torch.ones_like(ids), generation_config=config, past_key_values=cache,
                    logits_processor=LogitsProcessorList([self._finite]),
                    streamer=_Streamer(token_ids, lambda: show(self.renderer.text(token_ids))),
                )  # fmt: skip
            finish_reason = "stop" if token_ids[-1] in self._policy.stop_ids else "length"
            self._keep(adapter, (*prompt, *token_ids[:-1]), output.past_key_values)
        except KeyboardInterrupt:
            finish_reason = "interrupted"
        text = self.renderer.text(token_ids)
        return Answer(prompt_ids=prompt, token_ids=tuple(token_ids), text=text, finish_reason=finish_reason)

    def _keep(self, adapter: bool, ids: tuple[int, ...], cache: Any) -> None:
        """Keep the cache of `ids` for the next turn, if it holds every token's keys and values and nothing else.

        Windows and recurrent states cannot take several new tokens at once in all architectures.
        """
        layers = getattr(cache, "layers", ())
        if layers and all(type(layer) is DynamicLayer for layer in layers) and cache.get_seq_length() == len(ids):
            self._caches[adapter] = (ids, cache)

    def _finite(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not bool(scores.isfinite().all()):
            raise not_finite(self.name, self.recipe.model.dtype)
        return scores


class _Streamer:
    """Take tokens from `generate`, which gives the prompt first."""

    def __init__(self, token_ids: list[int], grown: Callable[[], object]) -> None:
        self._token_ids, self._grown = token_ids, grown
        self._is_prompt, self._shown = True, 0.0

    def put(self, value: torch.Tensor) -> None:
        if not self._is_prompt:
            self._token_ids += value.flatten().tolist()
            if time.monotonic() - self._shown >= SHOW_SECONDS:
                self._grown()
                self._shown = time.monotonic()
        self._is_prompt = False

    def end(self) -> None:
        pass


def open_subject(model: str, weights: str | None, checkpoint: int | str | None) -> Subject:
    """Return a run's weights, or a model by folder, GGUF file or Hub id. Loads none.

    A model in a run's export/ is asked as the run was trained: its system prompt, thinking tags and lengths.
    """
    path = Path(model).expanduser()
    if (path / "recipe.toml").is_file():
        return open_run(path, [ALL_WEIGHTS[weights or "policy"]], checkpoint)
    subject = open_model(model, [weights] if weights else (), checkpoint=checkpoint)
    if path.exists() and (run := task_run([model], None)):
        trained = run.recipe()
        parts = {"data": trained.data, "rollout": trained.rollout, "reward": trained.reward}
        recipe = subject.recipe.with_values(parts).with_values({"rollout.vllm": VLLMRecipe()})
    else:
        notify(f"{subject.name} is not in the export/ of a run, so no system prompt or length is known from training")
        half = context_of(load_config(subject.recipe.model)) // 2
        lengths = {"max_prompt_length": min(512, half), "max_completion_length": min(1024, half)}
        recipe = subject.recipe.with_values({f"rollout.{key}": value for key, value in lengths.items()})
    return replace(subject, recipe=recipe)


def utf8(text: str, where: str) -> str:
    """Return `text`. Raises UserInputError if a terminal or a shell gave bytes that are not UTF-8."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserInputError("is not UTF-8 text", where=where, next_step="write it in UTF-8")
    return text


def _with_template(subject: Subject) -> Subject:
    """Give a model without a chat template one that writes the messages line by line, and say so."""
    if subject.recipe.data.chat_template or (tokenizer := load_tokenizer(subject.recipe.model)).chat_template:
        return subject
    notify(f"{subject.name} has no chat template, so messages are lines of text; --chat-template FILE sets one")
    template = ("{{ bos_token }}" if puts_bos(tokenizer) else "") + BASE_TEMPLATE.replace(r"\n", "\n")
    return replace(subject, recipe=subject.recipe.with_values({"data.chat_template": template}))


@contextmanager
def open_chat(subject: Subject, weights: str | None, *, compare: bool, trust: bool, source: str) -> Iterator[ChatModel]:
    """Load the model of `subject`, given as `source`, for the block. Raises PopoError if it cannot be talked to."""
    refuse_untrusted(subject.recipe, source, trust, only=MODEL_CODE)
    if compare and not any(subject.adapters.values()):
        what = f"{source} is a model without an adapter, so there is nothing to compare it with"
        raise UserInputError(what, where="--compare", next_step="leave --compare out, or name a run's folder")
    subject = _with_template(subject)
    renderer = open_renderer(subject.recipe)
    policy = subject.load(subject.recipe)
    name = (weights or "policy") if any(subject.adapters.values()) else "model"
    with kept_weights(policy.model):  # nothing changes them here
        yield ChatModel(subject, name, renderer, policy)
