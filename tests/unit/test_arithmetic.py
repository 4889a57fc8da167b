"""The built-in task and the model that ships for it."""

from __future__ import annotations

import hashlib
import json

import pytest
from safetensors import safe_open

from popo_lite.errors import DataError, ModelError
from popo_lite.policy.load import TINY_FOLDER, load_tokenizer
from popo_lite.tasks.generated import ArithmeticTask, is_held_out
from popo_lite.tasks.rendering import Renderer
from popo_lite.tools.tiny_model import build_tokenizer, teach, teaching_pair, working
from popo_lite.types import Problem


def numbers(problem: Problem) -> tuple[int, int]:
    left, _, right = problem.id.removeprefix("arithmetic/").partition("+")
    return int(left), int(right)


@pytest.mark.parametrize("digits", [1, 2, 3, 6])
def test_problems_are_pure_right_and_of_the_asked_size(digits):
    task = ArithmeticTask(digits)
    for index in range(200):
        problem = task.train_problem(3, index)
        assert problem == ArithmeticTask(digits).train_problem(3, index)
        a, b = numbers(problem)
        assert len(str(a)) == len(str(b)) == digits
        assert problem.answer == str(a + b)
        assert problem.question == f"What is {a} + {b}?"
    assert [task.train_problem(0, i) for i in range(20)] != [task.train_problem(1, i) for i in range(20)]


def test_training_and_held_out_are_disjoint_in_either_order():
    task = ArithmeticTask(2)
    held_out = {frozenset(numbers(problem)) for problem in task.held_out(500)}
    trained = {frozenset(numbers(task.train_problem(seed, i))) for seed in range(3) for i in range(3000)}
    assert not held_out & trained
    assert all(is_held_out("arithmetic", a, b) == is_held_out("arithmetic", b, a) for a in range(60) for b in range(60))
    share = sum(is_held_out("arithmetic", a, b) for a in range(10, 100) for b in range(10, 100)) / 8100
    assert 0.07 < share < 0.13


def test_held_out_problems_are_distinct_and_counted():
    task = ArithmeticTask(2)
    assert len({problem.id for problem in task.held_out(500)}) == 500
    assert task.held_out(500)[:200] == task.held_out(200)
    # Recorded results belong to these problems.
    asked = [problem.id for problem in (*task.held_out(500), *(task.train_problem(1, index) for index in range(500)))]
    assert hashlib.sha256(repr(asked).encode()).hexdigest().startswith("93798486da1c2170c4226f4173155a62")
    with pytest.raises(DataError, match="held out, 5000 were asked for"):
        task.held_out(5000)


def test_the_teaching_text_has_no_held_out_sum():
    import random

    source = random.Random(5)
    for _ in range(3000):
        question, _ = teaching_pair(source)
        a, b = (int(word.strip("?")) for word in question.removeprefix("What is ").split(" + "))
        assert not is_held_out("arithmetic", a, b)


def test_transformers_reads_the_tokenizer_as_it_was_taught(tiny_recipe):
    """AutoTokenizer makes it a Qwen2Tokenizer, with a pre-tokenizer of its own; the ids must not differ."""
    import random

    from tokenizers import Tokenizer

    taught = Tokenizer.from_file(str(TINY_FOLDER / "tokenizer.json"))
    loaded = load_tokenizer(tiny_recipe().model)
    source = random.Random(2)
    for text in (part for _ in range(500) for part in teaching_pair(source)):
        assert loaded.encode(text) == taught.encode(text).ids


def test_working_is_column_addition():
    assert working(47, 85) == "7+5=12, 4+8+1=13"
    assert working(12, 34) == "2+4=6, 1+3=4"
    assert working(9, 9) == "9+9=18"


def test_step_by_step_ratio_counts_additions_before_the_box():
    texts = ["7+5=12, so \\boxed{12}", "\\boxed{12}", "\\boxed{1=2}", "7+5=12"]
    task = ArithmeticTask(2)
    assert [task.figures([text])["step_by_step_ratio"] for text in texts] == [1, 0, 0, 1]
    assert task.figures(texts) == {"step_by_step_ratio": 0.5}
    assert task.figures([]) == {}


def test_the_shipped_model_is_small_plain_and_reproducible():
    assert (TINY_FOLDER / "model.safetensors").stat().st_size < 2_000_000
    config = json.loads((TINY_FOLDER / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    with safe_open(TINY_FOLDER / "model.safetensors", "pt") as file:
        assert 300_000 < sum(file.get_tensor(name).numel() for name in file.keys()) < 1_100_000  # noqa: SIM118
    rebuilt = build_tokenizer().backend_tokenizer.to_str()
    assert json.loads(rebuilt)["model"] == json.loads((TINY_FOLDER / "tokenizer.json").read_text())["model"]


def test_teaching_again_lowers_the_loss_and_loads(tmp_path, tiny_recipe):
    losses = teach(tmp_path, steps=30, batch=16)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    from popo_lite.policy.policy import load_policy

    assert load_policy(tiny_recipe(f'model.id="{tmp_path}"')).quantized_modules == 14


def test_tokenizer_and_rendering(tiny_recipe):
    recipe = tiny_recipe()
    tokenizer = load_tokenizer(recipe.model)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    renderer = Renderer(recipe, tokenizer)
    problem = ArithmeticTask(2).train_problem(0, 0)
    prompt = renderer.render(problem)
    assert tokenizer.decode(prompt.token_ids) == f"<|user|>{problem.question}<|end|><|assistant|>"
    text = "Größe: 12 + 34 = \\boxed{46} 😀"
    assert renderer.text([*tokenizer.encode(text), tokenizer.eos_token_id]) == text
    system = Renderer(tiny_recipe('data.system_prompt="Be careful."'), tokenizer).render(problem)
    assert tokenizer.decode(system.token_ids).startswith("<|system|>Be careful.<|end|><|user|>")
    template = 'data.chat_template="Q: {{ messages[0].content }} A:"'
    assert tokenizer.decode(Renderer(tiny_recipe(template), tokenizer).render(problem).token_ids) == (
        f"Q: {problem.question} A:"
    )


def test_prompts_that_are_too_long_say_so(tiny_recipe):
    recipe = tiny_recipe("rollout.max_prompt_length=5")
    renderer = Renderer(recipe, load_tokenizer(recipe.model))
    problem = ArithmeticTask(2).train_problem(0, 0)
    assert not renderer.fits(problem)
    with pytest.raises(DataError, match=r"has 13 tokens, the limit is rollout.max_prompt_length = 5"):
        renderer.render(problem)


def test_a_model_without_a_template_says_what_to_set(tiny_recipe):
    recipe = tiny_recipe()
    tokenizer = load_tokenizer(recipe.model)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="set data.chat_template"):
        Renderer(recipe, tokenizer)
