"""Ask for model, data, reward and card, look at each, and write the recipe."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import click

from popo_lite.errors import DataError, PopoError, UserInputError
from popo_lite.recipe import DataRecipe, Recipe
from popo_lite.recipe_file import to_toml
from popo_lite.tasks import open_tasks
from popo_lite.tools.console.output import table, write
from popo_lite.tools.console.words import clean, memory
from popo_lite.tools.init.command import BUILT_IN
from popo_lite.tools.init.data import DataFacts, columns_of, likely_columns, look_at_data
from popo_lite.tools.init.draft import Answers, Card, Settings, decide, find_card, to_recipe, write_toml
from popo_lite.tools.init.hub import is_unreachable, offline_if_unreachable
from popo_lite.tools.init.model import ModelFacts, look_at_model
from popo_lite.tools.init.reward import Proposal, Trial, propose, read_functions, try_reward
from popo_lite.tools.plan.vram import MemoryPlan
from popo_lite.trust import refuse_untrusted

T = TypeVar("T")
Columns = tuple[str | None, str | None]
DEFAULT_GPU_MODEL = "Qwen/Qwen3-1.7B"


class Session:
    """One conversation that ends with a recipe. Unless it `asks`, the defaults are the answers."""

    def __init__(self, asks: bool, as_json: bool) -> None:
        self.asks, self.as_json = asks, as_json

    def run(
        self, model: str | None, data: str | None, columns: Columns, reward: str | None, card: str | None,
        output: Path | None,
    ) -> None:  # fmt: skip
        """Ask, look, decide, write and say what comes next."""
        if output is not None:
            check_new(output)
        here = find_card(card)
        with offline_if_unreachable():
            facts = self.model(model, here)
            problems = self.data(data, facts, columns)
        functions = self.reward(reward, problems)
        if card is None and self.asks:
            here = self.card(here)
        self.say(f"  {here.described()}")
        answers = Answers(facts, problems, functions, here)
        settings, plan = decide(answers)
        recipe = to_recipe(settings)
        if problems.problems:  # they could be looked at
            try:
                open_tasks(recipe)[1].held_out(recipe.eval.problems)
            except DataError as error:  # which training would raise
                if not is_unreachable(error):
                    raise
        trials = self.trials(recipe, problems, output)
        path = output or self.named(None, "Write the recipe to", str(free_name(default_name(answers))), "--output",
                                    check_new)  # fmt: skip
        with path.open("x", encoding="utf-8") as file:  # never over a file
            file.write(write_toml(settings, head_of(answers, plan, path)))
        self.report(path, recipe, settings, answers, plan, trials)

    def say(self, text: str = "") -> None:
        """Print untrusted text."""
        if not self.as_json:
            write(text, sys.stdout)

    def ask(self, question: str, default: str | None, option: str) -> str:
        """Return the answer to a question. Without a terminal and a default, raise UserInputError naming `option`."""
        if self.asks:
            shown = clean(question if default is None else f"{question} [{default}]")  # a column may have any name
            return str(click.prompt(shown, default=default, show_default=False)).strip()
        if default is None:
            raise UserInputError(f"{question}: there is no sensible default", where=option, next_step=f"give {option}")
        return default

    def named(self, name: str | None, question: str, default: str, option: str, look: Callable[[str], T]) -> T:
        """Return what `look` finds of the name that is given, or typed; ask again if what was typed cannot be used."""
        while True:
            answer = name or self.ask(question, default, option)
            try:
                return look(answer)
            except PopoError as error:
                if name or not self.asks:
                    raise
                self.say(f"  {error.what}\n  {error.next_step}")

    def model(self, name: str | None, card: Card) -> ModelFacts:
        """Return what is known of the model; ask again if there is none of that name."""
        default = DEFAULT_GPU_MODEL if card.on_gpu else "tiny"
        question = "Model (tiny, a Hub id, a folder or a .gguf file)"
        facts = self.named(name, question, default, "--model", look_at_model)
        self.say("\n".join(f"  {line}" for line in (facts.described(), *facts.notes)))
        return facts

    def data(self, name: str | None, model: ModelFacts, columns: Columns) -> DataFacts:
        """Return what is known of the problems; ask again if they cannot be used."""
        default = "arithmetic" if model.id == "tiny" else "gsm8k"
        facts = self.named(
            name, f"Data ({BUILT_IN})", default, "--data", lambda answer: look_at_data(self.part(answer, columns))
        )
        if model.id == "tiny" and facts.part.dataset != "arithmetic":
            note = "tiny was only taught sums of two numbers; expect no right answers to other questions"
            facts = replace(facts, notes=(*facts.notes, note))
        self.say("\n".join(f"  {line}" for line in (facts.described(), *facts.notes)))
        return facts

    def part(self, name: str, columns: Columns) -> DataRecipe:
        """Return the recipe's [data] with the columns, which are asked for unless their names say enough."""
        found = columns_of(name)
        if not found:
            if columns != (None, None):
                next_step = "leave out --prompt-column and --answer-column"
                raise UserInputError(f"{name} has no columns to choose", where="--data", next_step=next_step)
            return DataRecipe(dataset=name)
        prompt, answer, sure = likely_columns(found)
        if sure and columns == (None, None):
            return DataRecipe(dataset=name)
        self.say(f"  columns: {', '.join(found)}")
        prompt = columns[0] or self.ask("Column with the question", prompt, "--prompt-column")
        answer = columns[1] or self.ask("Column with the reference answer", answer, "--answer-column")
        return DataRecipe(dataset=name, prompt_column=prompt, answer_column=answer)

    def reward(self, text: str | None, data: DataFacts) -> Proposal:
        """Return the reward that is proposed, or else the one that the user names."""
        proposal, shown = propose(data), None
        if proposal is None:
            self.say("  the answers are free text, and no built-in function can tell a right one")
        else:
            functions = proposal.functions
            shown = functions if isinstance(functions, str) else to_toml(functions[0])
            if self.asks and text is None:
                self.say(f"  proposed: {shown}: {proposal.why}")
        text = text or self.ask("Reward (a built-in function, or your own module:function)", shown, "--reward")
        functions = read_functions(text)
        if proposal is not None and functions == proposal.functions:
            return proposal
        own = isinstance(functions, str) and ":" in functions
        return Proposal(functions, "your own function: it gets the text and the problem" if own else "as you asked")

    def card(self, here: Card) -> Card:
        """Return the card that the user names; ask again if it is none."""
        shown = here.size if here.on_gpu else "cpu"
        question = f"Card ({here.described()}; another one: 24GiB, or cpu)"
        return self.named(
            None, question, shown, "--card", lambda answer: here if answer == shown else find_card(answer)
        )

    def trials(self, recipe: Recipe, data: DataFacts, output: Path | None) -> list[Trial]:
        """Grade three references and show the verdicts. What the user named here is the user's own code."""
        refuse_untrusted(recipe, str(output or "recipe"), overrides=["reward.functions="], only=("reward.",))
        if not data.problems:
            self.say("  the references could not be looked at, so the reward was not tried")
            return []
        trials = try_reward(recipe, data.usual)
        if not self.as_json:
            said = {True: "right", False: "wrong", None: "no solution to try"}
            rows = [(_short(t.reference), _short(t.answer or ""), said[t.is_right], said[t.empty_is_right])
                    for t in trials]  # fmt: skip
            self.say()
            table("The reward on three references", ("reference", "as an answer", "counts as", "no answer"), rows)
        if any(trial.is_right is False for trial in trials):
            self.say("Your function finds a reference wrong if it is all of the answer. Is that what you want?")
        return trials

    def report(
        self, path: Path, recipe: Recipe, settings: Settings, answers: Answers, plan: MemoryPlan | None,
        trials: list[Trial],
    ) -> None:  # fmt: skip
        """Print each choice with its reason, whether it fits, and what comes next."""
        card, name = answers.card, shlex.quote(str(path))
        plan_it = f"popo-lite plan {name}" + (f" --vram {card.size}" if card.on_gpu else "")
        measure = f"popo-lite bench {name} --prompts 1 --steps 1"
        slow = not card.on_gpu and answers.model.id != "tiny"
        commands = [plan_it] * (plan is not None) + [measure] * slow + [f"popo-lite train {name}"]
        if self.as_json:
            found = {
                "recipe": str(path),
                "settings": {key: setting._asdict() for key, setting in settings.items()},
                "fits": None if plan is None else plan.fits,
                "peak_bytes": None if plan is None else plan.peak.total_bytes,
                "card": {"on_gpu": card.on_gpu, "memory_bytes": card.machine.vram_bytes},
                "references": [trial._asdict() for trial in trials],
                "notes": answers.notes,
                "next": commands,
            }
            click.echo(json.dumps(found))
            return
        rows = [(key, _short(value if isinstance(value, str) else to_toml(value)), why)
                for key, (value, why) in settings.items()]  # fmt: skip
        self.say()
        table(f"Written to {path}", ("setting", "value", "why"), rows)
        if plan is None:
            self.say("The memory plan could not be made: it is not known how large the model is.")
        else:
            peak, there = memory(plan.peak.total_bytes), memory(card.machine.vram_bytes)
            self.say(f"It fits by the memory plan: {peak} of {there}.")
        if slow:
            prompts, most = recipe.data.prompts_per_step, recipe.rollout
            self.say(
                f"{recipe.train.steps} steps with {prompts * most.num_generations} answers each, of up to "
                f"{most.max_completion_length} tokens: bench measures steps with 1 of {prompts} prompts."
            )
        self.say("\n".join(["\nNext", *(f"  {command}" for command in commands)]))


def head_of(answers: Answers, plan: MemoryPlan | None, path: Path) -> list[str]:
    """Return the comment at the head of the file."""
    planned = "The memory plan could not be made: the size of the model is not known."
    if plan is not None:
        planned = f"Planned peak: {memory(plan.peak.total_bytes)}, in the phase {plan.peak.name}."
    model, data = answers.model.id, answers.data.part.dataset
    return [f"{model} on {data}, for {answers.card.described()}: by popo-lite init.",
            f"popo-lite train {shlex.quote(str(path))}", planned, *answers.notes]  # fmt: skip


def default_name(answers: Answers) -> Path:
    """Return a file name for this model and data."""
    model, data = (Path(part).name for part in (answers.model.id, answers.data.part.dataset))
    data = re.sub(r"[.](jsonl?|csv|parquet)$", "", data)
    return Path(re.sub(r"[^\w.-]+", "-", f"{model.removesuffix('.gguf')}_{data}.toml").lower())


def free_name(path: Path) -> Path:
    """Return `path`, or with a number if there is such a file."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return free


def check_new(name: str | Path) -> Path:
    """Return the path of a file that can be written. Raises UserInputError if it exists, or its folder does not."""
    path = Path(name)
    if path.exists():
        next_step = f"--output {shlex.quote(str(free_name(path)))}"
        raise UserInputError(f"{path} exists and is not overwritten", where="--output", next_step=next_step)
    if not path.absolute().parent.is_dir():
        what, next_step = f"there is no folder {path.parent}", f"mkdir -p {shlex.quote(str(path.parent))}"
        raise UserInputError(what, where="--output", next_step=next_step)
    return path


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."
