"""Tokenizers and chat templates as users bring them: they work, or are refused by name before weights are loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

import popo_lite.opening
from popo_lite.callbacks import Callback
from popo_lite.errors import ModelError, PopoError
from popo_lite.policy.load import TINY_FOLDER, load_tokenizer
from popo_lite.policy.policy import load_policy
from popo_lite.policy.tokens import open_renderer
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import to_toml
from popo_lite.run_folder import RunFolder
from popo_lite.tasks.rendering import Renderer, puts_bos
from popo_lite.tools.tiny_model import build_tokenizer
from popo_lite.trainer import Trainer
from popo_lite.types import Problem

ROWS = 320  # of the tiny model's embedding
QUESTION = Problem(id="rows/7", messages=({"role": "user", "content": "What is 3 + 4?"},), answer="7")
TWO_TURNS = Problem(id="rows/8", messages=QUESTION.messages * 2, answer="7")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate')"
)
ALTERNATE += " }}{% endif %}{{ m.content }}{% endfor %}"


@pytest.fixture
def model(tmp_path: Path, tiny_recipe) -> Callable[..., Recipe]:
    """`model(tokenizer, "key=value")`: a recipe of the tiny model with that tokenizer."""

    def make(tokenizer, *overrides: str) -> Recipe:
        folder = Path(shutil.copytree(TINY_FOLDER, tmp_path / "model"))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
        tokenizer.save_pretrained(folder)
        return tiny_recipe(f"model.id={folder}", *overrides)

    return make


@pytest.fixture
def no_weights(monkeypatch) -> None:
    monkeypatch.setattr(popo_lite.opening, "load_policy", lambda _: pytest.fail("the weights were loaded"))


def full_tokenizer():
    """The tiny model's tokenizer with a token for every row: the next one is beyond the embedding."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<|endoftext|>", *(f"<{index}>" for index in range(ROWS - len(tokenizer) - 1))])
    assert len(tokenizer) == ROWS
    return tokenizer


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(recipe: Recipe) -> PopoError:
    with pytest.raises(PopoError) as caught:
        Trainer(recipe, Callback())
    return caught.value


@pytest.mark.parametrize("pad", [None, "<|beyond|>"])
def test_any_pad_token_will_do_as_it_is_never_used(model, tmp_path, pad):
    """No PAD and no EOS was a TypeError, and a PAD token beyond the embedding an IndexError."""
    tokenizer = full_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
        assert tokenizer.pad_token_id == ROWS
    rows = [{"prompt": f"What is {'1 + ' * n}1?", "answer": str(n + 1)} for n in range(6)]  # of different lengths
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = (f"data.dataset={tmp_path / 'rows.json'}", "eval.problems=2", "data.prompts_per_step=4")
    recipe = model(tokenizer, "train.steps=1", *data)
    loaded = load_tokenizer(recipe.model)
    assert (loaded.pad_token, loaded.eos_token) == (pad, None)
    (tmp_path / "run").mkdir()
    with Trainer(recipe, Callback()) as trainer:
        assert trainer.run(RunFolder(tmp_path / "run")).summary is not None


@pytest.mark.usefixtures("no_weights")
def test_a_template_token_beyond_the_embedding_is_refused_by_name(model):
    tokenizer = full_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ '<|im_start|>' + m.content }}{% endfor %}"
    error = refused(model(tokenizer))
    assert "its prompt holds <|im_start|> (id 320), and the model's embedding has 320 rows" in error.what


@pytest.mark.usefixtures("no_weights")
def test_a_token_of_a_row_beyond_the_embedding_is_refused_by_name(model, tmp_path):
    tokenizer = full_tokenizer()
    tokenizer.add_tokens(["<think>"])
    rows = [{"prompt": f"{n} {'<think>' if n == 5 else ''}", "answer": str(n)} for n in range(9)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    error = refused(model(tokenizer, f"data.dataset={tmp_path / 'rows.json'}", "eval.problems=1"))
    assert error.where == "problem rows.json/6"
    assert "holds <think> (id 320)" in error.what


@pytest.mark.usefixtures("no_weights")
def test_answers_that_could_never_end_are_refused(model):
    tokenizer = full_tokenizer()
    tokenizer.eos_token = None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    recipe = model(tokenizer)
    for name in ("config.json", "generation_config.json"):
        edit(Path(recipe.model.id) / name, eos_token_id=400)
    assert "answers end at None (400), and the model's embedding has 320 rows" in refused(recipe).what
    for name in ("config.json", "generation_config.json"):
        edit(Path(recipe.model.id) / name, eos_token_id=None)
    assert "names a token that ends an answer" in refused(recipe).what


def test_an_end_beyond_the_embedding_is_left_out_beside_a_usable_one(model):
    recipe = model(build_tokenizer())
    edit(Path(recipe.model.id) / "generation_config.json", eos_token_id=[1, 400])
    assert load_policy(recipe).stop_ids == {1}


# ---------------------------------------------------------------------- BOS


def with_bos():
    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<|system|>"
    bos = ("<|system|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|system|> $A", special_tokens=[bos])
    return tokenizer


def test_the_advice_for_a_base_model_keeps_bos(tiny_recipe):
    tokenizer = with_bos()
    assert puts_bos(tokenizer)
    assert not puts_bos(build_tokenizer())
    for each, starts in ((tokenizer, "<|system|>What is 3 + 4?\n"), (build_tokenizer(), "What is 3 + 4?\n")):
        each.chat_template = None
        with pytest.raises(ModelError) as caught:
            Renderer(tiny_recipe(), each)
        override = str(caught.value.next_step).partition("--set '")[2].removesuffix("'")  # as a shell passes it
        renderer = Renderer(tiny_recipe(override), each)
        assert each.decode(renderer.token_ids(QUESTION)) == starts
        assert renderer.check(QUESTION) is None


@pytest.mark.parametrize(
    ("start", "warning"),
    [("", "prompts do not begin with <|system|>"), ("{{ bos_token }}", None), ("{{ bos_token * 2 }}", "twice")],
)
def test_a_template_that_begins_otherwise_than_texts_is_warned_of(tiny_recipe, start, warning):
    template = f'data.chat_template="{start}{{{{ messages[0].content }}}}"'
    found = Renderer(tiny_recipe(template), with_bos()).check(QUESTION)
    assert (warning is None and found is None) or warning in str(found)


def test_a_template_may_begin_with_bos_though_texts_do_not(tiny_recipe):
    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<|system|>"
    template = 'data.chat_template="{{ bos_token }}{{ messages[0].content }}"'
    assert Renderer(tiny_recipe(template), tokenizer).check(QUESTION) is None


def test_a_run_reports_the_warning(model):
    class Messages(Callback):
        def message(self, text: str) -> None:
            heard.append(text)

    heard: list[str] = []
    with Trainer(model(with_bos()), Messages()):
        assert [text for text in heard if "prompts do not begin with <|system|>" in text]


# ---------------------------------------------------------------------- roles


def test_a_refused_message_is_blamed_on_what_brought_it(tiny_recipe):
    def error(template: str, problem: Problem, *overrides: str) -> ModelError:
        with pytest.raises(ModelError) as caught:
            Renderer(tiny_recipe(f'data.chat_template="{template}"', *overrides), build_tokenizer()).token_ids(problem)
        return caught.value

    brief = "data.system_prompt=Be brief."
    found = error(NO_SYSTEM + "{{ messages[0].content }}", QUESTION, brief)
    assert (found.where, "--set data.system_prompt=;" in str(found.next_step)) == ("data.system_prompt", True)
    for overrides in ((), (brief,)):
        found = error(ALTERNATE, TWO_TURNS, *overrides)
        assert "of problem rows/8: alternate" in found.what
        assert "correct the messages of that row" in str(found.next_step)
        assert "system_prompt" not in str(found)
    assert "problem rows/7" in error("{{ messages[0].content + 1 }}", QUESTION).what  # a TypeError of the template


@pytest.mark.usefixtures("no_weights")
def test_rows_are_rendered_before_weights_are_loaded(tiny_recipe, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": str(n)}] * (1 + (n == 3)), "answer": "1"} for n in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = f"data.dataset={tmp_path / 'rows.json'}"
    error = refused(tiny_recipe(data, "eval.problems=1", f'data.chat_template="{ALTERNATE}"'))
    assert "of problem rows.json/4: alternate" in error.what
    error = refused(tiny_recipe(f'data.chat_template="{NO_SYSTEM}{{{{ 1 }}}}"', "data.system_prompt=Be brief."))
    assert error.where == "data.system_prompt"


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ messages[-1].content }}", "leaves it out"),
        ("{{ messages[0].content }}", "leaves out the question of problem arithmetic/"),
    ],
)
def test_a_template_must_write_question_and_system_prompt(tiny_recipe, template, what):
    assert what in refused(tiny_recipe(f'data.chat_template="{template}"', "data.system_prompt=Be brief.")).what


def test_prompts_are_rendered_from_tokenizer_and_config_alone(tiny_recipe):
    assert open_renderer(tiny_recipe()).token_ids(QUESTION)


@pytest.mark.parametrize("special", [True, False])
def test_a_completions_text_keeps_thinking_tags_and_no_other_special_tokens(tiny_recipe, special):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>", "<|done|>"]})
    tokenizer.add_tokens([AddedToken(tag, special=special) for tag in ("<think>", "</think>")], special_tokens=special)
    ids = tokenizer.encode("<think>1 + 2</think>3<|call|><|done|>")
    ids += [tokenizer.eos_token_id, tokenizer.pad_token_id]
    end = tokenizer.convert_tokens_to_ids("<|done|>")
    assert Renderer(tiny_recipe(), tokenizer).text(ids) == "<think>1 + 2</think>3"
    kept = tiny_recipe("reward.keep_special_tokens=true")
    assert Renderer(kept, tokenizer, stop_ids=[end]).text(ids) == "<think>1 + 2</think>3<|call|>"
    other = tiny_recipe('reward.thinking_tags=["<|call|>", "<|done|>"]')
    assert Renderer(other, tokenizer).text(ids).endswith("3<|call|><|done|>")


@pytest.mark.parametrize(("end", "opened"), [("<think>\n", True), ("", False), ("<think></think>", False)])
def test_a_generation_prompt_may_open_the_thinking(tiny_recipe, end, opened):
    template = "{% for m in messages %}{{ m.content }};{% endfor %}{% if add_generation_prompt %}" + end + "{% endif %}"
    recipe = tiny_recipe("data.chat_template=" + to_toml(template))
    assert Renderer(recipe, build_tokenizer()).opens_thinking is opened
