"""`popo-lite generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from popo_lite.tools.checkpoint_option import checkpoint_option
from popo_lite.tools.completion import complete_run
from popo_lite.trust import MODEL_CODE, refuse_untrusted, trust_option


@click.command(context_settings={"show_default": True})
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN", shell_complete=complete_run)
@click.argument("question")
@click.option("--weights", type=click.Choice(["policy", "siamese"]), default="policy")
@checkpoint_option
@click.option("--samples", type=click.IntRange(min=1), default=1, help="Answers to draw.")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=0.7)
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
    from popo_lite.errors import UserInputError
    from popo_lite.run_folder import RunFolder
    from popo_lite.tools.console.output import notify, write

    if not question.isprintable() and any("\ud800" <= character <= "\udfff" for character in question):
        raise UserInputError("is not UTF-8 text", where="QUESTION", next_step="write the question in UTF-8")
    folder = RunFolder(run)
    recipe, saved = folder.recipe(), folder.find_checkpoint(checkpoint)
    refuse_untrusted(recipe, run, trust, only=MODEL_CODE)
    adapter = folder.trained_adapter(weights, saved)
    for notice in folder.notices(checkpoint, saved):
        notify(notice)

    import torch

    from popo_lite.policy.policy import load_trained_policy
    from popo_lite.policy.tokens import open_renderer
    from popo_lite.samplers import SamplingParams
    from popo_lite.samplers.hf import HFSampler
    from popo_lite.types import Problem

    if recipe.train.cpu_threads:
        torch.set_num_threads(recipe.train.cpu_threads)
    renderer = open_renderer(recipe)
    prompt = renderer.render(Problem(id=question, messages=({"role": "user", "content": question},), answer=""))
    policy = load_trained_policy(recipe, adapter)
    params = SamplingParams(temperature=temperature, max_completion_length=recipe.rollout.max_completion_length)
    # Not the engine that trained it: for one question, starting that would take longer than answering.
    sampler, stream = HFSampler(policy, recipe, text=renderer.text), ("generate", seed)
    [answers] = sampler.sample([prompt], count=samples, params=params, policy_version=policy.version, stream=stream)
    if as_json:
        found = [{"text": a.text, "finish_reason": a.finish_reason.value, "mean_logp": a.mean_logp} for a in answers]
        click.echo(json.dumps({"question": question, "answers": found}))
    else:
        write("\n".join(answer.text for answer in answers), sys.stdout)
