"""`popo-lite generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from popo_lite.tools.chat.temperature import Temperature
from popo_lite.tools.checkpoint_option import checkpoint_option
from popo_lite.tools.completion import complete_run
from popo_lite.trust import MODEL_CODE, refuse_untrusted, trust_option


@click.command(context_settings={"show_default": True})
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN", shell_complete=complete_run)
@click.argument("question")
@click.option("--weights", type=click.Choice(["policy", "siamese"]), default="policy")
@checkpoint_option
@click.option("--samples", type=click.IntRange(min=1), default=1, help="Answers to draw.")
@click.option("--temperature", type=Temperature(greedy=False), default=0.7, help="From 0.01 to 100.")
@click.option("--seed", type=click.IntRange(min=0), default=0)
@trust_option
@click.option("as_json", "--json", is_flag=True, help="Print the answers as JSON, with all their control characters.")
def generate(
    run: Path, question: str, weights: str, checkpoint: int | str | None, samples: int, temperature: float, seed: int,
    trust: bool, as_json: bool,
) -> None:  # fmt: skip
    """Ask the model that RUN trained a QUESTION.

    \b
    Example:
      popo-lite generate runs/tiny_cpu-seed0 'What is 17 + 25?'
    """
    from popo_lite.policy.tokens import open_renderer
    from popo_lite.samplers import SamplingParams
    from popo_lite.samplers.hf import HFSampler
    from popo_lite.tools.benchmarks.subject import open_run
    from popo_lite.tools.chat.model import ALL_WEIGHTS, utf8
    from popo_lite.tools.console.output import write
    from popo_lite.types import Problem

    utf8(question, "QUESTION")
    subject = open_run(run, [ALL_WEIGHTS[weights]], checkpoint)
    recipe = subject.recipe
    refuse_untrusted(recipe, run, trust, only=MODEL_CODE)
    renderer = open_renderer(recipe)
    prompt = renderer.render(Problem(id=question, messages=({"role": "user", "content": question},), answer=""))
    policy = subject.load(recipe)
    params = SamplingParams(temperature=temperature, max_completion_length=recipe.rollout.max_completion_length)
    # Not the engine that trained it: for one question, starting that would take longer than answering.
    sampler, stream = HFSampler(policy, recipe, text=renderer.text), ("generate", seed)
    [answers] = sampler.sample([prompt], count=samples, params=params, policy_version=policy.version, stream=stream)
    if as_json:
        found = [{"text": a.text, "finish_reason": a.finish_reason.value, "mean_logp": a.mean_logp} for a in answers]
        click.echo(json.dumps({"question": question, "answers": found}))
    else:
        write("\n".join(answer.text for answer in answers), sys.stdout)
