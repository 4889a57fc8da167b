"""Draft a recipe from what is known of model, data, reward and card, until the memory plan says that it fits."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

from popo_lite.errors import ModelError, RecipeError, UserInputError
from popo_lite.host_memory import available_bytes
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import SECTIONS, flatten, load_recipe, schema_of, shipped_recipes, to_toml
from popo_lite.tools.console.words import clean, memory
from popo_lite.tools.init.data import MEASURED, DataFacts
from popo_lite.tools.init.model import ModelFacts
from popo_lite.tools.init.reward import BOXED, Proposal
from popo_lite.tools.plan.advice import Advice, advice_for
from popo_lite.tools.plan.command import installed_gpu, parse_size
from popo_lite.tools.plan.shapes import KNOWN_CONFIGS, shape_of
from popo_lite.tools.plan.terms import ADA
from popo_lite.tools.plan.vram import SHORTFALL, Machine, MemoryPlan, plan_memory

SMALL, NARROW, LARGE = 50e6, 1e9, 6e9
"""Numbers of parameters: below them a model learns with larger steps, has narrow layers; above, needs wide ones."""
LONGEST_PROMPT = 2048
FROM_SHIPPED = ("lora.", "siamese.", "objective.", "rollout.temperature", "rollout.max_num_seqs", "rollout.vllm.",
                "rollout.max_completion_length", "data.prompts_per_step", "train.tokens_per_microbatch",
                "reward.truncated", "eval.temperature")  # fmt: skip
"""Beginnings of the keys that are taken from the shipped recipe for the same model."""
OF_THE_TASK = "rollout.max_completion_length"
"""One of them that is taken only if the data is the same, too."""
LONGEST_ON_CPU = 256
"""Tokens of an answer on a CPU: with 1,024 of them, 30 steps of a model of 135M parameters take days."""
COMMENT_COLUMN, WIDTH = 30, 120


class Card(NamedTuple):
    """Where the run shall take place: a GPU, or the CPU with its host memory. `here` says whether it is in here."""

    machine: Machine
    on_gpu: bool
    here: bool

    @property
    def size(self) -> str:
        """The memory as options take it."""
        return f"{self.machine.vram_bytes / 2**30:.4g}GiB"

    def described(self) -> str:
        """Return the card on one line."""
        size, others = memory(self.machine.vram_bytes), self.machine.others_bytes
        if not self.on_gpu:
            return f"a CPU with {size} of memory left"
        held = f", of which other processes hold {memory(others)}" if others else ""
        return f"a GPU of {size}{held}"


class Answers(NamedTuple):
    """All that decides the recipe: facts about the model and the data, the reward, and the card."""

    model: ModelFacts
    data: DataFacts
    reward: Proposal
    card: Card

    @property
    def notes(self) -> list[str]:
        """Notes on the model and the data, for the user."""
        return [*self.model.notes, *self.data.notes]


class Setting(NamedTuple):
    """A value of a recipe, and why it was chosen."""

    value: Any
    why: str


Settings = dict[str, Setting]


def find_card(text: str | None) -> Card:
    """Return the card that `text` names, `24GiB` or `cpu`; without text the GPU of this machine, else its CPU."""
    installed = installed_gpu()
    if text is None and installed is not None:
        total, others, capability = installed
        return Card(Machine(total, others, available_bytes(), capability), on_gpu=True, here=True)
    if text is None or text.strip().lower() == "cpu":
        return Card(Machine(available_bytes()), on_gpu=False, here=True)
    capability = installed[2] if installed else ADA
    return Card(Machine(parse_size(text, "--card"), capability=capability), on_gpu=True, here=installed is not None)


def draft(answers: Answers) -> Settings:
    """Return the settings before the memory plan, each with its reason."""
    model, data, reward, card = answers
    size = model.parameters or 1.5e9
    shipped = dict[str, Setting]()
    if model.shipped is not None:
        name, made = model.shipped
        defaults = flatten(Recipe())
        shipped = {key: Setting(value, f"as in the recipe {name}") for key, value in flatten(made).items()
                   if key.startswith(FROM_SHIPPED) and value != defaults.get(key)
                   and (key != OF_THE_TASK or made.data.dataset == data.part.dataset)
                   and (card.on_gpu or not key.startswith("rollout.vllm."))}  # fmt: skip
    settings: Settings = {"model.id": Setting(model.id, model.described())}
    if not card.on_gpu:
        settings["model.dtype"] = Setting("float32", "CPUs are slow in 16 bit")
    elif card.machine.capability < (8, 0):
        settings["model.dtype"] = Setting("float16", "this GPU does not compute in bfloat16")
    if card.on_gpu:
        settings["lora.rank"] = Setting(32, "as in the recipes for a GPU")
        settings["lora.alpha"] = Setting(64.0, "twice the rank")
    if size < NARROW:
        settings["siamese.head_width"] = Setting(128, "for a narrow model; the default is for 1.5B and more")
    if size >= LARGE:
        settings["siamese.head_width"] = Setting(4096, "as published for 7B models")
        settings["siamese.tau"] = Setting(0.999, "as published for 7B models")
    settings |= _rollout(answers, size) | shipped | _data(answers, size)
    settings["reward.functions"] = Setting(reward.functions, reward.why)
    if model.thinks and not model.can_be_told_not_to_think:
        why = "rewarding truncated answers teaches a model that thinks never to stop"
        settings["reward.truncated"] = Setting("wrong", why)
    if card.on_gpu:
        settings["optimizer.name"] = Setting("adamw8bit", "its state takes a quarter of the memory")
    if size < NARROW:
        rate = 2e-3 if size < SMALL else 3e-4
        settings["optimizer.learning_rate"] = Setting(rate, "small models need more than the 2e-5 of a 1.5B model")
    steps = 500 if card.on_gpu else 60 if size < SMALL else 30
    settings["train.steps"] = Setting(steps, "stop at any time: Ctrl-C saves, and resume goes on")
    if not card.on_gpu:
        settings["train.device"] = Setting("cpu", "")
        if size < NARROW:
            settings["train.cpu_threads"] = Setting(1, "more threads are slower at this size")
            settings["train.gradient_checkpointing"] = Setting(False, "its activations are small")
    settings |= _evaluation(data, card)
    sequence = sum(settings[f"rollout.max_{part}_length"].value for part in ("prompt", "completion"))
    if sequence > 8192:
        settings["train.tokens_per_microbatch"] = Setting(sequence, "one prompt with its longest answer")
    order = list(schema_of("popo"))
    return dict(sorted(settings.items(), key=lambda item: order.index(item[0])))


def _rollout(answers: Answers, size: float) -> Settings:
    model, _, reward, card = answers
    engine, why = "hf", "samples from the trainer's own model; enough on a CPU"
    if card.on_gpu:
        installed = importlib.util.find_spec("vllm") is not None
        engine = "vllm" if installed or not card.here else "hf"
        why = "samples several times faster than hf"
        if engine == "hf":
            why = 'vLLM is not installed here; with the extra gpu, "vllm" samples several times faster'
    answer, length = reward.completion_tokens, "tokens of the longest answer"
    if model.thinks and not model.can_be_told_not_to_think:
        answer = 8192
    elif not card.on_gpu and answer > LONGEST_ON_CPU:
        answer, length = LONGEST_ON_CPU, f"{length}, few as a CPU is slow"
    prompt, measured = longest_prompt(answers)
    if model.shape is not None and (room := model.shape.context_tokens - prompt) < answer:
        answer = max(room, 1)
    if size < SMALL:
        answer = min(answer, 64)
    settings = {
        "rollout.engine": Setting(engine, why),
        "rollout.max_prompt_length": Setting(prompt, measured),
        "rollout.max_completion_length": Setting(answer, f"{length}; a longer one is truncated"),
    }
    if not card.on_gpu and size < SMALL:
        settings["rollout.max_num_seqs"] = Setting(256, "decodes all rollouts of a step together")
    return settings


def longest_prompt(answers: Answers) -> tuple[int, str]:
    """Return `rollout.max_prompt_length` in steps of 32 tokens, and how it was found."""
    model, data = answers.model, answers.data
    if not data.problems:
        return 512, "not measured: the problems could not be looked at"
    system = asked_for(answers) or ""
    if model.tokenizer is None:
        longest = max(sum(len(m["content"]) for m in one.messages) for one in data.problems) + len(system)
        tokens, how = longest // 3 + 32, "estimated from the characters of the longest prompt, without the tokenizer"
    else:
        from popo_lite.tasks.rendering import Renderer

        settings = {"data.system_prompt": system or None, "data.chat_template": template_for(model)}
        renderer = Renderer(Recipe().with_values(settings), model.tokenizer)
        tokens = max(len(renderer.token_ids(problem)) for problem in islice(data.problems, 2 * MEASURED))
        how = f"the longest prompt has {tokens:,} tokens"
    return min(max(32 * math.ceil(tokens / 32), 32), LONGEST_PROMPT), how


def template_for(model: ModelFacts) -> str | None:
    """Return a chat template for a model without one."""
    if model.template != "" or model.tokenizer is None:
        return None
    from popo_lite.tasks.rendering import puts_bos

    bos = "{{ bos_token }}" if puts_bos(model.tokenizer) else ""
    return bos + "{% for m in messages %}{{ m.content }}\n{% endfor %}"


def asked_for(answers: Answers) -> str | None:
    """Return the system prompt: the form of the answers, and "/no_think" for a model that can be told so."""
    if answers.model.id == "tiny":  # it was taught without one
        return None
    form = answers.reward.system_prompt
    if answers.model.can_be_told_not_to_think and answers.data.part.dataset != "comparison":
        return f"{form or ''} /no_think".strip()
    return form


def _data(answers: Answers, size: float) -> Settings:
    model, data, reward, card = answers
    settings: Settings = {"data.dataset": Setting(data.part.dataset, data.described())}
    for key in ("prompt_column", "answer_column"):
        if value := getattr(data.part, key):
            settings[f"data.{key}"] = Setting(value, "")
    name, made = model.shipped or ("", Recipe())
    if made.data.chat_template and reward.system_prompt == BOXED:  # that template asks for a box itself
        settings["data.chat_template"] = Setting(made.data.chat_template, f"as in the recipe {name}")
    elif template := template_for(model):
        settings["data.chat_template"] = Setting(template, "the model has none: the messages alone")
    elif prompt := asked_for(answers):
        why = "asks for the form of answer that the reward reads"
        why += "; /no_think: without it the model thinks for thousands of tokens first" * prompt.endswith("/no_think")
        settings["data.system_prompt"] = Setting(prompt, why)
    if data.rows is not None or not data.problems:
        settings["data.overlong_prompts"] = Setting("skip", "skip longer prompts, and count them")
    if not card.on_gpu and size >= SMALL:
        settings["data.prompts_per_step"] = Setting(8, "a quarter of the default: a CPU is slow")
    return settings


def _evaluation(data: DataFacts, card: Card) -> Settings:
    most = 500 if card.on_gpu else 100
    own = {"gsm8k": "gsm8k", "deepscaler": "math500"}.get(data.part.dataset)
    if own:
        return {
            "eval.dataset": Setting(own, "problems that are not trained on"),
            "eval.problems": Setting(most, "asked before and after"),
        }
    questions = data.questions if data.problems else 500  # of math500, the smallest that may not have been looked at
    count = most if questions is None else min(most, max(1, questions // 5), questions - 1)
    why = "held out of training, asked before and after" if count else "a single question, which is trained on"
    return {"eval.problems": Setting(count, why)}


def decide(answers: Answers) -> tuple[Settings, MemoryPlan | None]:
    """Return the settings after the memory plan's own suggestions; the plan is None for a shape that is not known.

    Raises UserInputError that names a smaller model if no setting makes the run fit.
    """
    settings, model = draft(answers), answers.model
    if model.shape is None:
        return settings, None
    plan, advice = _planned(settings, answers)
    if advice.smallest_vram_bytes is not None:
        smaller = next((one.id for one in smaller_models(model) if _fits(answers._replace(model=one))), None)
        what = f"{model.id} does not fit {answers.card.described()}: {advice.next_step}"
        next_step = f"--model {smaller} fits; docs/cards.md has more" if smaller else "use a larger card"
        raise UserInputError(what, where="--card", next_step=next_step)
    for change in advice.changes:
        before, after = memory(change["before_bytes"]), memory(change["after_bytes"])
        why = f"so that it fits: {change['eases']} takes {after} instead of {before}"
        if change["eases"] == SHORTFALL:
            why = f"so that it fits: vLLM's share lacked {before} for one sequence"
        settings |= {key: Setting(value, why) for key, value in change["values"].items()}
    return settings, plan.with_values(advice.values)


def _planned(settings: Settings, answers: Answers) -> tuple[MemoryPlan, Advice]:
    assert answers.model.shape is not None  # noqa: S101
    plan = plan_memory(to_recipe(settings), answers.model.shape, **answers.card.machine._asdict())
    return plan, advice_for(plan)


def _fits(answers: Answers) -> bool:
    try:
        return _planned(draft(answers), answers)[1].smallest_vram_bytes is None
    except UserInputError:
        return False


def to_recipe(settings: Mapping[str, Setting]) -> Recipe:
    """Return the recipe of settings. Raises RecipeError if they are not valid together."""
    overrides = [f"{key}={to_toml(setting.value)}" for key, setting in settings.items()]
    try:
        return load_recipe(shipped_recipes()["template"], overrides)
    except RecipeError as error:
        raise RecipeError(error.what.replace("--set ", ""), next_step=error.next_step) from error


def smaller_models(than: ModelFacts) -> list[ModelFacts]:
    """Return the models with a shipped recipe that are smaller than this one, the largest first."""
    found = []
    for name in {load_recipe(path).model.id for path in shipped_recipes().values()} & KNOWN_CONFIGS.keys():
        with suppress(ModelError):
            found.append(ModelFacts(name, shape_of(KNOWN_CONFIGS[name])))
    smaller = (facts for facts in found if (facts.parameters or 0) < (than.parameters or 0))
    return sorted(smaller, key=lambda facts: -(facts.parameters or 0))


def write_toml(settings: Settings, head: Sequence[str]) -> str:
    """Return the recipe as TOML, each setting with its reason beside it, or above it if the line would be too long."""
    lines = [f"# {clean(line)}" for line in head]
    for section in SECTIONS:
        own = {key: setting for key, setting in settings.items() if key.rpartition(".")[0] == section}
        lines += ["", f"[{section}]"] if own else []
        for key, (value, why) in own.items():
            line, why = f"{key.rpartition('.')[2]} = {_multiline(value)}", clean(why)
            beside = f"{line:<{COMMENT_COLUMN - 1}} # {why}"
            if not why or ("\n" not in line and len(beside) <= WIDTH):
                lines.append(beside if why else line)
            else:
                lines += [f"# {why}", line]
    return "\n".join(lines) + "\n"


def _multiline(value: Any) -> str:
    """Return a value as TOML; text of several lines stays so."""
    several = isinstance(value, str) and "\n" in value.strip()
    if several and "'''" not in value and value.replace("\n", "").isprintable():
        return f"'''\n{value}'''"
    return to_toml(value)
