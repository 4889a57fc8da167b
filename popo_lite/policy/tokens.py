"""Check tokenizer, chat template and the ids of special tokens against the model before its weights are loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from popo_lite.errors import ModelError
from popo_lite.policy.load import load_config, load_generation_config, load_tokenizer
from popo_lite.recipe import Recipe
from popo_lite.tasks.rendering import Renderer, applying_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_renderer(recipe: Recipe) -> Renderer:
    """Return what renders prompts, without loading weights.

    Raises ModelError if the tokenizer or the chat template cannot be used, or if no answer could end.
    """
    tokenizer, config = load_tokenizer(recipe.model), load_config(recipe.model)
    base = SimpleNamespace(config=config, generation_config=load_generation_config(recipe.model))
    stops = stop_ids_of(base, tokenizer, recipe.data.chat_template)
    return Renderer(recipe, tokenizer, embeddings=embeddings_of(config), stop_ids=stops)


def embeddings_of(config: Any) -> int | None:
    """Return the number of rows of the model's embedding, or None if the config does not say."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def stop_ids_of(base: Any, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> frozenset[int]:
    """Return every id that ends an answer: all EOS ids of model and tokenizer, and the chat template's end of turn.

    A base model's EOS is often not its template's end of turn. Without that one, answers would run on into a next turn
    and be trained on, unnoticed because special tokens are not shown. Ids beyond the embedding, which are never
    sampled, are left out. Raises ModelError if nothing ends an answer.
    """
    stops: set[int] = set()
    for owner in (base.generation_config, base.config, base.config.get_text_config(), tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        stops.update([ids] if isinstance(ids, int) else ids or ())
    turns, text = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "answer"}], ""
    try:
        if chat_template or tokenizer.chat_template:
            with applying_template():
                text = str(tokenizer.apply_chat_template(turns, chat_template=chat_template, tokenize=False))
    except TemplateSyntaxError as error:
        where = "data.chat_template" if chat_template else f"the tokenizer of {tokenizer.name_or_path}"
        next_step = "correct it, or set data.chat_template (popo-lite eval: --chat-template FILE)"
        raise ModelError(f"the chat template is not valid Jinja: {error}", where=where, next_step=next_step) from error
    except TemplateError:  # the template refuses assistant turns
        pass
    _, found, after = text.rpartition("answer")
    if found:  # some templates leave the assistant's text out
        ids = tokenizer.encode(after, add_special_tokens=False)
        stops.update(token for token in ids[:1] if token in tokenizer.all_special_ids)
    rows = embeddings_of(base.config)
    usable = frozenset(stop for stop in stops if rows is None or 0 <= stop < rows)
    if not usable:
        what = "neither model, tokenizer nor chat template names a token that ends an answer"
        next_step = "give the model an eos_token_id in generation_config.json"
        if stops:
            ends = ", ".join(f"{tokenizer.convert_ids_to_tokens(stop)} ({stop})" for stop in sorted(stops))
            what = f"answers end at {ends}, and the model's embedding has {rows} rows: it can never sample that"
            next_step = "use the tokenizer that the model was trained with, or correct its eos_token_id"
        raise ModelError(what, where="model.id", next_step=next_step)
    return usable
