"""What a rank of tests/invariant/test_sharding.py does: `torchrun sharded_ranks.py FOLDER WHAT [CASES]`.

Rank 0 writes what it found to FOLDER/WHAT.json.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from popo_lite.callbacks import Callback
from popo_lite.distributed import Ranks, join
from popo_lite.errors import EngineError
from popo_lite.policy.load import quant_state_of
from popo_lite.policy.policy import Policy
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder
from popo_lite.samplers.probe import SamplerGuard
from popo_lite.trainer import Trainer
from popo_lite.types import Completion, FinishReason
from updates import backward, groups_of

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny_cpu.toml"
FIXED = ("eval.problems=0", "optimizer.max_grad_norm=1e30", "reward.workers=1", "train.tokens_per_microbatch=150",
         "rollout.max_prompt_length=60", "rollout.max_completion_length=60")  # fmt: skip


@contextmanager
def trainer_of(ranks: Ranks, *overrides: str):
    """A trainer as if training had gone on for a while."""
    with Trainer(load_recipe(RECIPE, overrides), Callback(), ranks=ranks) as found:
        torch.manual_seed(4)
        with torch.no_grad():
            for _, parameter in found.policy.adapter_parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, dtype=parameter.dtype))
            for average in found.learner.siamese.average.values():
                average.add_(0.05 * torch.randn(average.shape, dtype=average.dtype))
        yield found


def base_bytes(policy: Policy) -> tuple[int, int]:
    """Bytes that this rank holds of the layers' weights, and of the scales of those in 4 bit."""
    weights = scales = 0
    for name, weight in policy.trunk.named_parameters():
        if ".layers." in f".{name}" and "lora_" not in name:
            weights += weight.to_local().nbytes if isinstance(weight, DTensor) else weight.nbytes
            if (state := quant_state_of(policy.trunk, name)) is not None:
                scales += state.absmax.nbytes
    return weights, scales


def update(trainer: Trainer, *, one_sequence: bool) -> dict[str, Any]:
    """Scores, gradients and metrics of a step."""
    groups = groups_of(trainer)
    whole = trainer.learner.plan(groups)
    if one_sequence:
        whole = replace(whole, sequences=whole.sequences[:1])
    plan = trainer.learner.part(whole)
    result = backward(trainer, plan)
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trainer.policy.trainable_parameters()
    }
    scores = trainer.learner.gap_mean([group.rollouts[0] for group in groups])
    return {"gradients": gradients, "sums": result.sums, "scores": scores, "sequences": len(plan.sequences)}


def distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Largest difference of a gradient, a loss or a score, relative to the norm of all gradients, or to 1."""
    norm = float(torch.stack([gradient.norm() for gradient in expected["gradients"].values()]).norm())
    gaps = [
        float((found["gradients"][name] - gradient).abs().max()) / norm
        for name, gradient in expected["gradients"].items()
    ]
    gaps += [abs(found["sums"][name] - value) for name, value in expected["sums"].items()]
    return max(*gaps, abs(found["scores"] - expected["scores"]))


def compare(ranks: Ranks, case: dict[str, Any]) -> dict[str, Any]:
    """Compare an update of a sharded base with that of a whole one on all ranks, and on this one alone."""
    options, kinds = [*FIXED, *case["overrides"]], {}
    sharded, size = 'distributed.strategy="fsdp2"', None
    for kind, over, extra in (("alone", Ranks(), ()), ("whole", ranks, ()), ("sharded", ranks, (sharded,))):
        with trainer_of(over, *options, *extra) as trainer:
            # The second update: the first leaves the base as passes leave it.
            kinds[kind] = [update(trainer, one_sequence=case.get("one_sequence", False)) for _ in range(2)][1]
            size = base_bytes(trainer.policy)
            kinds[kind]["bytes"] = size
            kinds[kind]["said"] = [trainer.policy.quantized_modules, trainer.policy.quantized_share,
                                   trainer.policy.packing, trainer.policy.notices]  # fmt: skip
    return {
        "over_whole": max(ranks.gather(distance(kinds["sharded"], kinds["whole"]))),
        "over_alone": max(ranks.gather(distance(kinds["sharded"], kinds["alone"]))),
        "sequences": ranks.gather(kinds["sharded"]["sequences"]),
        "bytes_whole": kinds["alone"]["bytes"],
        "bytes": ranks.gather(kinds["sharded"]["bytes"]),
        "same_facts": all(ranks.gather(kinds["sharded"]["said"] == kinds["alone"]["said"])),
        "gradient": max(float(each.abs().max()) for each in kinds["sharded"]["gradients"].values()),
    }


def run(ranks: Ranks, folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Train for a step and resume, with a whole and with a sharded base; return the adapters' difference."""
    found = []
    for strategy in ("ddp", "fsdp2"):
        path = folder / f"{case['name']}-{strategy}-{ranks.rank}"
        path.mkdir()
        overrides = [*case["overrides"], f'distributed.strategy="{strategy}"']
        for steps in (1, 2):
            recipe = load_recipe(RECIPE, [*overrides, f"train.steps={steps}"])
            with Trainer(recipe, Callback(), ranks=ranks) as trainer:
                trainer.run(RunFolder(path), resume=steps > 1)
        found.append({name: p.detach().clone() for name, p in trainer.policy.trainable_parameters()})
    whole, sharded = found
    return {"difference": max(ranks.gather(max(float((whole[n] - sharded[n]).abs().max()) for n in whole)))}


class Server:
    """An engine with weights of its own, which answers each rank otherwise."""

    engine = "server"

    def __init__(self, rank: int) -> None:
        self._rank, self.ranks = rank, Ranks()

    def sync(self, version: int) -> None:
        pass

    def sample(self, prompts: Any, **_: Any) -> list[list[Completion]]:
        ids = tuple(range(10, 15 + 3 * self._rank))
        answer = Completion(token_ids=ids, sampler_logps=(-1.0,) * len(ids), finish_reason=FinishReason.STOP, text="")
        return [[answer] for _ in prompts]


def guarded(ranks: Ranks) -> bool:
    """Whether all ranks measure the same about engines that answer them otherwise."""
    with trainer_of(ranks, *FIXED, 'distributed.strategy="fsdp2"') as trainer:
        guard = SamplerGuard(trainer.recipe, trainer.policy, Server(ranks.rank))
        prompts = [group.prompt for group in groups_of(trainer)]
        measured = ranks.gather(guard.measure(prompts)[:3])
    return measured[0] == measured[1] and all(number > 0 for number in measured[0])


def out_of_memory(ranks: Ranks) -> dict[str, Any]:
    """Let rank 1 run out of memory in its second pass; return what rank 0 hears."""
    same = guarded(ranks)
    with trainer_of(ranks, *FIXED, 'distributed.strategy="fsdp2"') as trainer:
        policy, passes = trainer.policy, []
        compute = policy.hidden_states

        def hidden_states(*arguments: Any) -> torch.Tensor:
            passes.append(arguments)
            if ranks.rank == 1 and len(passes) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return compute(*arguments)

        policy.hidden_states = hidden_states
        try:
            backward(trainer, trainer.learner.part(trainer.learner.plan(groups_of(trainer))))
        except EngineError as error:
            if not ranks.first:
                raise
            return {"kind": type(error).__name__, "what": error.what, "next_step": error.next_step, "guarded": same}
    return {}


def main(folder: Path, what: str, cases: str = "[]") -> None:
    torch.set_num_threads(1)
    with join() as ranks:
        if what == "out_of_memory":
            found: Any = out_of_memory(ranks)
        else:
            found = {
                case["name"]: run(ranks, folder, case) if what == "run" else compare(ranks, case)
                for case in json.loads(cases)
            }
        if ranks.first:
            (folder / f"{what}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
