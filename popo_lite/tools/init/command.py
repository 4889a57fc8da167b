"""Define `popo-lite init`."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from popo_lite.errors import DataError, PopoError, UserInputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from popo_lite.recipe import DataRecipe, Recipe
    from popo_lite.tools.init.data import DataFacts
    from popo_lite.tools.init.draft import Card, Settings
    from popo_lite.tools.init.model import ModelFacts
    from popo_lite.tools.init.reward import Trial
    from popo_lite.tools.plan.vram import MemoryPlan

T = TypeVar("T")
DEFAULT_GPU_MODEL = "Qwen/Qwen3-1.7B"
BUILT_IN = "arithmetic, comparison, gsm8k, deepscaler, math500, reasoning-gym:TASK, a file or a Hub id"


@click.command()
@click.option("--model", metavar="MODEL", help="tiny, a Hub id, a folder or a .gguf file.")
@click.option("--data", metavar="DATA", help=f"{BUILT_IN}.")
@click.option("--prompt-column", metavar="NAME", help="Column with the question of a file or Hub dataset.")
@click.option("--answer-column", metavar="NAME", help="Column with the reference answer.")
@click.option(
    "--reward", metavar="REWARD", help="Name of a function, a TOML table with options, or your own module:function."
)
@click.option("--card", metavar="CARD", help="Memory of the GPU, e.g. 24GiB, or cpu; default: what is here.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="File to write; never one that exists.")
@click.option("--yes", is_flag=True, help="Ask nothing: take the default for every option that is not given.")
@click.option("--json", "as_json", is_flag=True, help="Print what was decided as JSON and nothing else.")
def init(
    model: str | None,
    data: str | None,
    prompt_column: str | None,
    answer_column: str | None,
    reward: str | None,
    card: str | None,
    output: Path | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Write your first recipe: asks for model, data, reward and card, looks at all four, and explains each choice.

    The recipe fits the card by the memory plan (`popo-lite plan`). No weights are loaded, and code that comes with a
    model or dataset is never run; a reward function that you name yourself is.

    \b
    Example:
      popo-lite init --model tiny --data arithmetic --card cpu --yes --output first.toml
    """
    ask = Asker(asks=not yes and is_terminal() and not as_json)
    if not yes and not ask.asks:
        given = {"--model": model, "--data": data, "--reward": reward, "--card": card, "--output": output}
        if missing := [name for name, value in given.items() if value is None]:
            what = f"there is no terminal to ask in, and these are not given: {', '.join(missing)}"
            raise UserInputError(what, where="popo-lite init", next_step="add them, or --yes to take the defaults")
    Session(ask, as_json).run(model, data, (prompt_column, answer_column), reward, card, output)


def is_terminal() -> bool:
    """Check whether questions can be asked and answered."""
    return sys.stdin.isatty() and sys.stdout.isatty()


class Asker:
    """Ask questions on the terminal; without one, take the defaults."""

    def __init__(self, *, asks: bool) -> None:
        self.asks = asks

    def ask(self, question: str, default: str | None, option: str) -> str:
        """Return the answer to a question. Without a terminal and a default, raise UserInputError naming `option`."""
        if self.asks:
            from popo_lite.tools.console.words import clean

            shown = clean(question if default is None else f"{question} [{default}]")  # a column may have any name
            return str(click.prompt(shown, default=default, show_default=False)).strip()
        if default is None:
            raise UserInputError(f"{question}: there is no sensible default", where=option, next_step=f"give {option}")
        return default


class Session:
    """One conversation that ends with a recipe."""

    def __init__(self, ask: Asker, as_json: bool) -> None:
        self.ask, self.as_json = ask, as_json

    def say(self, text: str = "") -> None:
        """Print untrusted text."""
        from popo_lite.tools.console.output import write

        if not self.as_json:
            write(text, sys.stdout)

    def run(
        self, model: str | None, data: str | None, columns: tuple[str | None, str | None], reward: str | None,
        card: str | None, output: Path | None,
    ) -> None:  # fmt: skip
        """Ask, look, decide, write and say what comes next."""
        from popo_lite.tools.init.draft import find_card, to_recipe
        from popo_lite.tools.init.hub import offline_if_unreachable

        if output is not None:
            check_new(output)
        here = find_card(card)
        with offline_if_unreachable():
            facts = self.model(model, here)
            problems = self.data(data, facts, columns)
        functions, why, proposal = self.reward(reward, problems)
        if card is None and self.ask.asks:
            here = self.card(here)
        self.say(f"  {here.described()}")
        settings, plan = self.decide(facts, problems, functions, why, proposal, here)
        recipe = to_recipe(settings)
        check_split(recipe, problems)
        trials = self.trials(recipe, problems, output)
        path = self.output(output, facts.id, str(problems.part.dataset))
        text = self.text(settings, facts, problems, here, plan, path)
        with path.open("x", encoding="utf-8") as file:  # never over a file
            file.write(text)
        self.report(path, recipe, settings, facts, problems, here, plan, trials)

    def named(self, name: str | None, question: str, default: str, option: str, look: Callable[[str], T]) -> T:
        """Return what `look` finds of the name that is given, or typed; ask again if what was typed cannot be used."""
        while True:
            answer = name or self.ask.ask(question, default, option)
            try:
                return look(answer)
            except PopoError as error:
                if name or not self.ask.asks:
                    raise
                self.say(f"  {error.what}\n  {error.next_step}")

    def model(self, name: str | None, card: Card) -> ModelFacts:
        """Return what is known of the model; ask again if there is none of that name."""
        from popo_lite.tools.init.model import look_at_model

        default = DEFAULT_GPU_MODEL if card.on_gpu else "tiny"
        question = "Model (tiny, a Hub id, a folder or a .gguf file)"
        facts = self.named(name, question, default, "--model", look_at_model)
        self.say(f"  {facts.described()}")
        for note in facts.notes:
            self.say(f"  {note}")
        return facts

    def data(self, name: str | None, model: ModelFacts, columns: tuple[str | None, str | None]) -> DataFacts:
        """Return what is known of the problems; ask again if they cannot be used."""
        from popo_lite.tools.init.data import look_at_data

        default = "arithmetic" if model.id == "tiny" else "gsm8k"
        facts = self.named(
            name, f"Data ({BUILT_IN})", default, "--data", lambda answer: look_at_data(self.part(answer, columns))
        )
        self.say(f"  {facts.described()}")
        for note in facts.notes:
            self.say(f"  {note}")
        if model.id == "tiny" and facts.part.dataset != "arithmetic":
            note = "tiny was only taught sums of two numbers; expect no right answers to other questions"
            facts = replace(facts, notes=(*facts.notes, note))
            self.say(f"  {note}")
        return facts

    def part(self, name: str, columns: tuple[str | None, str | None]) -> DataRecipe:
        """Return the recipe's [data] with the columns, which are asked for unless their names say enough."""
        from popo_lite.recipe import DataRecipe
        from popo_lite.tools.init.data import columns_of, likely_columns

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
        prompt = columns[0] or self.ask.ask("Column with the question", prompt, "--prompt-column")
        answer = columns[1] or self.ask.ask("Column with the reference answer", answer, "--answer-column")
        return DataRecipe(dataset=name, prompt_column=prompt, answer_column=answer)

    def reward(self, text: str | None, data: DataFacts) -> tuple[Any, str, Any]:
        """Return the value of `reward.functions`, why, and the proposal that it was measured against."""
        from popo_lite.recipe_file import to_toml
        from popo_lite.tools.init.reward import propose, read_functions

        proposal = propose(data)
        shown = None if proposal is None else _shown(proposal.functions, to_toml)
        if proposal is None:
            self.say("  the answers are free text, and no built-in function can tell a right one")
        elif self.ask.asks and text is None:
            self.say(f"  proposed: {shown}: {proposal.why}")
        text = text or self.ask.ask("Reward (a built-in function, or your own module:function)", shown, "--reward")
        if proposal is not None and text == shown:
            return proposal.functions, proposal.why, proposal
        functions = read_functions(text)
        named = functions if isinstance(functions, str) else None
        why = "your own function: it gets the text and the problem" if named and ":" in named else "as you asked"
        return functions, why, proposal if proposal and named == proposal.functions else None

    def card(self, here: Card) -> Card:
        """Return the card that the user names; ask again if it is none."""
        from popo_lite.tools.init.draft import find_card

        shown = f"{here.machine.vram_bytes / 2**30:.4g}GiB" if here.on_gpu else "cpu"
        question = f"Card ({here.described()}; another one: 24GiB, or cpu)"
        return self.named(
            None, question, shown, "--card", lambda answer: here if answer == shown else find_card(answer)
        )

    def decide(
        self, model: ModelFacts, data: DataFacts, functions: Any, why: str, proposal: Any, card: Card
    ) -> tuple[Settings, MemoryPlan | None]:
        """Return settings that fit. Raises UserInputError that names a smaller model if none do."""
        from popo_lite.tools.init.draft import DoesNotFitError, draft, fit, smaller_model

        def settle(facts: ModelFacts) -> tuple[Settings, MemoryPlan | None]:
            return fit(draft(facts, data, functions, why, proposal, card), facts, card)

        def fits(facts: ModelFacts) -> bool:
            try:
                return settle(facts)[1] is not None
            except UserInputError:
                return False

        try:
            return settle(model)
        except DoesNotFitError as error:
            smaller = smaller_model(model, fits)
            next_step = f"--model {smaller} fits; docs/cards.md has more" if smaller else "use a larger card"
            raise UserInputError(error.what, where=error.where, next_step=next_step) from error

    def trials(self, recipe: Recipe, data: DataFacts, output: Path | None) -> list[Trial]:
        """Grade three references and show the verdicts. What the user named here is the user's own code."""
        from popo_lite.tools.console.output import table
        from popo_lite.tools.init.reward import try_reward
        from popo_lite.trust import refuse_untrusted

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

    def output(self, given: Path | None, model: str, data: str) -> Path:
        """Return a file that does not exist."""
        if given is not None:
            return given
        name = "_".join(re.sub(r"[^\w.-]+", "-", Path(part).name.removesuffix(".gguf")) for part in (model, data))
        default = free_name(Path(f"{re.sub(r'[.](jsonl?|csv|parquet)$', '', name).lower()}.toml"))
        return self.named(None, "Write the recipe to", str(default), "--output", check_new)

    def text(
        self, settings: Settings, model: ModelFacts, data: DataFacts, card: Card, plan: MemoryPlan | None, path: Path
    ) -> str:
        """Return the content of the file."""
        from popo_lite.tools.console.words import memory
        from popo_lite.tools.init.draft import write_toml

        head = [f"{model.id} on {data.part.dataset}, for {card.described()}: by popo-lite init.",
                f"popo-lite train {shlex.quote(str(path))}"]  # fmt: skip
        head.append("The memory plan could not be made: the size of the model is not known." if plan is None else
                    f"Planned peak: {memory(plan.peak.total_bytes)}, in the phase {plan.peak.name}.")  # fmt: skip
        return write_toml(settings, "\n".join([*head, *model.notes, *data.notes]))

    def report(
        self, path: Path, recipe: Recipe, settings: Settings, model: ModelFacts, data: DataFacts, card: Card,
        plan: MemoryPlan | None, trials: list[Trial],
    ) -> None:  # fmt: skip
        """Print each choice with its reason, whether it fits, and what comes next."""
        from popo_lite.recipe_file import to_toml
        from popo_lite.tools.console.output import table
        from popo_lite.tools.console.words import memory

        size = f"{card.machine.vram_bytes / 2**30:.4g}GiB"
        plan_it = f"popo-lite plan {shlex.quote(str(path))}" + (f" --vram {size}" if card.on_gpu else "")
        measure = f"popo-lite bench {shlex.quote(str(path))} --prompts 1 --steps 1"
        slow = not card.on_gpu and model.id != "tiny"
        commands = [plan_it] * (plan is not None) + [measure] * slow + [f"popo-lite train {shlex.quote(str(path))}"]
        if self.as_json:
            found = {
                "recipe": str(path),
                "settings": {key: {"value": value, "why": why} for key, (value, why) in settings.items()},
                "fits": None if plan is None else plan.fits,
                "peak_bytes": None if plan is None else plan.peak.total_bytes,
                "card": {"on_gpu": card.on_gpu, "memory_bytes": card.machine.vram_bytes},
                "references": [trial._asdict() for trial in trials],
                "notes": [*model.notes, *data.notes],
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


def check_split(recipe: Recipe, data: DataFacts) -> None:
    """Raise DataError if the data cannot be split as the recipe says, which training would refuse."""
    from popo_lite.tasks import open_tasks
    from popo_lite.tools.init.hub import is_unreachable

    if not data.problems:  # they could not be looked at
        return
    try:
        open_tasks(recipe)[1].held_out(recipe.eval.problems)
    except DataError as error:
        if not is_unreachable(error):
            raise


def _shown(functions: Any, to_toml: Any) -> str:
    """Return a proposal as the user would type it."""
    only = functions[0] if isinstance(functions, list) and len(functions) == 1 else functions
    return only if isinstance(only, str) else str(to_toml(only))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."
