"""That a run on several ranks is the run of one process: the same answers, updates, evaluations and records.

Two and four processes with gloo train the same cases as one, whole runs by the real trainer. In float64 only the order
of sums may differ: between the sequences of a step, where the division over ranks comes in, as it differs between
splits into micro-batches.
"""

from __future__ import annotations

import json
import math
import re
from itertools import chain

import pytest
import torch

from popo_lite.metrics import METRICS
from ranks import ASKED, BAD_GRADIENTS, results
from small_models import save_phi

SIZES = (2, 4)

OF_THE_MACHINE = ("seconds", "tokens_per_second", "peak_memory_bytes")
OF_THE_DIVISION = ("rank_tokens_ratio", "reduced_bytes", "micro_batches")
"""They say how the work was divided, so each number of ranks has its own."""
OF_DIVIDED_PROMPTS = ("trained_tokens", "shared_tokens")
"""Each rank that has answers to a divided prompt forwards it: what the first gains the second loses."""

# With a large `max_gap` the log-probs of the sampler are made coarse (`ranks.coarse`), as if it were not the policy.
FLOAT64 = ('model.quantization="none"', 'model.dtype="float64"', 'reward.functions=[{name="regex", pattern="[0-3]"}]',
           "rollout.num_generations=4", "rollout.max_completion_length=20", "data.prompts_per_step=6", "train.steps=3",
           "train.save_steps=2", "eval.problems=3", "output.samples_per_step=99", "rollout.max_gap=9")  # fmt: skip
ENTROPY = "objective.entropy_coef=0.05"

CASES: dict[str, tuple[str, ...]] = {
    "popo": (ENTROPY, "eval.problems=5", "eval.samples_per_problem=2", "eval.every=1", "optimizer.max_grad_norm=100"),
    "weights from the trainer": (
        ENTROPY, 'objective.weights_from="trainer"', 'objective.weights="sequence_logprob"', "data.prompts_per_step=5",
    ),
    "entropy over all": (ENTROPY, 'objective.entropy_over="all"', "objective.target_entropy=3.0"),
    "raft": ("objective.algorithm=raft", 'objective.normalizer="reference"', "optimizer.max_grad_norm=0.01"),
    "mixed": (
        ENTROPY, "objective.algorithm=mixed", "objective.negative_weight=0.3",
        "objective.importance_sampling_clip_max=2.0", "data.prompts_per_step=7",
    ),
    "grpo": (ENTROPY, "objective.algorithm=grpo"),
    "grpo with a KL term": (
        ENTROPY, "objective.algorithm=grpo", "objective.kl_coef=0.1", "objective.loss_type=dapo",
    ),
    "adaptive budget": (
        ENTROPY, "rollout.adaptive.enabled=true", "rollout.adaptive.round_size=2", "rollout.adaptive.max_rollouts=10",
        "rollout.adaptive.positives_wanted=2",
    ),
    # Nobody has anything to train on in the first step, and one rank alone in the second.
    "scarce": (ENTROPY, 'reward.functions=[{name="regex", pattern="S"}]'),
    "one prompt": (ENTROPY, "data.prompts_per_step=1", "eval.problems=1"),
    "many micro-batches": (
        ENTROPY, "train.packing=false", "train.shared_prefix=false", "train.tokens_per_microbatch=100",
        "train.gradient_checkpointing=true",
    ),
    "skipped and harder": (
        ENTROPY, "data.dataset=SUMS", "data.curriculum.enabled=true", "data.curriculum.column=level",
        "data.curriculum.window=3", "data.curriculum.low=0.05", "data.curriculum.high=0.1", "rollout.skip_known=true",
        "rollout.explore_ratio=0.0", "train.steps=6", 'reward.functions=[{name="regex", pattern="[0-9a-o]"}]',
        "data.prompts_per_step=3",
    ),
    "conversations": (
        ENTROPY, "rollout.environment.name=a_game:Game", "reward.functions=environment",
        "rollout.max_completion_length=90",
    ),
}  # fmt: skip

GAME = '''
class Game:
    """Right if the first of two answers has a digit."""

    def reset(self, problem):
        self.heard = []

    def step(self, text):
        self.heard.append(text)
        return "more", len(self.heard) == 2

    def reward(self):
        return any(digit in self.heard[0] for digit in "0123")
'''

SHIPPED = ("train.steps=4", "data.prompts_per_step=6", "eval.problems=5", "output.samples_per_step=99")
"""tiny_cpu, an NF4 Llama in float32; its third step has one positive."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each rank has at the end, by number of ranks and case."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "a_game.py").write_text(GAME)
    sums = [(level, a) for level in (1, 2, 3) for a in range(2 * 10 ** (level - 1), 2 * 10 ** (level - 1) + 7)]
    rows = [{"id": str(a), "prompt": f"What is {a} + {a + 3}?", "answer": 2 * a + 3, "level": x} for x, a in sums]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = save_phi(folder / "phi")
    cases = {
        name: tuple(override.replace("SUMS", str(folder / "sums.jsonl")) for override in (*FLOAT64, *overrides))
        for name, overrides in CASES.items()
    }
    cases = {name: (f'model.id="{model}"', *overrides) for name, overrides in cases.items()}
    cases[BAD_GRADIENTS] = (*cases["popo"], "train.steps=6", "train.save_steps=1")
    cases["shipped"] = SHIPPED
    return {
        size: results(folder / str(size), size, cases | ({ASKED: cases["entropy over all"]} if size == 2 else {}))
        for size in (1, *SIZES)
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_one_process(runs, case, size):
    """In float64 to 1e-12 of the update: sums of some thousand terms in another order, divided by Adam's root."""
    check(runs[size][0][case], runs[1][0][case], weights=1e-12, state=1e-12, metrics=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_ranks_equal_one_process_in_the_shipped_recipe(runs, size):
    """In float32 the rounding of a gradient that nearly cancels is large next to it, and Adam's step follows it."""
    check(runs[size][0]["shipped"], runs[1][0]["shipped"], weights=1e-3, state=1e-4, metrics=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", [*CASES, "shipped"])
def test_all_ranks_hold_the_same(runs, case, size):
    """Bit for bit, also in the records: no rank may decide otherwise than another."""
    first, *others = (rank[case] for rank in runs[size])
    for other in others:
        for ours, theirs in zip(states(other), states(first), strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert other["cursor"] == first["cursor"]
        for kind in ("metrics", "evaluations"):
            assert without(other[kind], *OF_THE_MACHINE) == without(first[kind], *OF_THE_MACHINE)
        assert other["checkpoints"] == []
    assert first["checkpoints"] != []


@pytest.mark.parametrize("size", SIZES)
def test_ranks_roll_back_as_one_process_does(runs, size):
    expected = runs[1][0][BAD_GRADIENTS]
    assert expected["rollbacks"] == 1
    for rank in runs[size]:
        found = rank[BAD_GRADIENTS]
        assert found["rollbacks"] == 1
        first = runs[size][0][BAD_GRADIENTS]
        check({**found, "samples": first["samples"], "checkpoints": first["checkpoints"]}, expected,
              weights=1e-12, state=1e-12, metrics=1e-12)  # fmt: skip
        for ours, theirs in zip(states(found), states(first), strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_asked_for_on_several_ranks_changes_nothing_of_the_run(runs):
    for asked, theirs in ((rank[ASKED], rank["entropy over all"]) for rank in runs[2]):
        for ours, undisturbed in zip(states(asked), states(theirs), strict=True):
            assert ours.keys() == undisturbed.keys()
            assert all(torch.equal(ours[name], undisturbed[name]) for name in ours)
        assert asked["cursor"] == theirs["cursor"]
        assert asked["samples"] == theirs["samples"]
        assert without(asked["metrics"], *OF_THE_MACHINE) == without(theirs["metrics"], *OF_THE_MACHINE)
        planned = [line for line in asked["evaluations"] if line["when"] != "asked"]
        assert without(planned, "seconds") == without(theirs["evaluations"], "seconds")
        assert [line["step"] for line in asked["evaluations"] if line["when"] == "asked"] == [2]
        said = "\n".join(asked["messages"])
        for text in ("paused after step 1 of 3", "continued after step 1 of 3", "after step 2: "):
            assert text in said
        assert len(asked["answers"]) == 6
        assert asked["answers"] == runs[2][0][ASKED]["answers"]
    assert any(re.search("checkpoint: .*step-000001$", text) for text in runs[2][0][ASKED]["messages"])


def test_other_weights_on_a_rank_are_refused_by_all(runs):
    """Also if a single one differs in its last bit."""
    for rank in runs[2]:
        assert re.match("other weights than rank 0.s are held by rank 1", rank[ASKED]["divergence"])


def test_the_cases_are_what_they_are_meant_to_be(runs):
    lines = {case: result["metrics"] for case, result in runs[1][0].items()}
    assert [line["positives"] for line in lines["scarce"]][:2] == [0, 1]
    assert lines["shipped"][2]["positives"] == 1
    assert any(line["prompts_skipped"] for line in lines["skipped and harder"])
    assert len({line["level"] for line in lines["skipped and harder"]}) > 1
    assert len({len(group["answers"]) for group in runs[1][0]["adaptive budget"]["samples"]}) > 1
    assert all(line["grad_norm"] < 100 for line in lines["popo"])
    assert all(line["grad_norm"] > 1 for line in lines["grpo"])
    assert all(line["logp_gap_mean"] > 0.1 for line in lines["popo"])
    assert all(line["micro_batches"] > 1 for line in lines["many micro-batches"])
    assert len({line["entropy_coef"] for line in lines["entropy over all"]}) == 3
    assert all(len(answer["messages"]) == 3 for group in runs[1][0]["conversations"]["samples"][:1]
               for answer in group["answers"] if answer["finish_reason"] == "stop")  # fmt: skip
    # A rank with all that is trained, and ranks with nothing.
    for size in SIZES:
        assert runs[size][0]["scarce"]["metrics"][1]["rank_tokens_ratio"] == size
    assert {line["reduced_bytes"] for line in chain.from_iterable(lines.values())} == {None}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", [*CASES, "shipped"])
def test_a_step_reduces_the_gradients_of_what_it_trains_and_nothing_else(runs, case, size):
    result = runs[size][0][case]
    has_similarity = not any(name in case for name in ("raft", "grpo"))
    expected = result["bytes"]["adapters"] + (result["bytes"]["head"] if has_similarity else 0)
    assert [line["reduced_bytes"] or 0 for line in result["metrics"]] == result["reduced"]
    for line in result["metrics"]:
        assert line["reduced_bytes"] == (None if line["skipped_reason"] else expected)
        if not line["skipped_reason"]:
            assert 1 <= line["rank_tokens_ratio"] <= size


# --------------------------------------------------------------------- what is compared


def check(found, expected, *, weights, state, metrics):
    """Compare two results. `weights` and `state` are relative to norms, `metrics` is relative, and absolute below 1."""
    start = expected["weights"][0]
    moved = [distance(each, start) for each in expected["weights"]]
    assert moved[-1] > 0
    assert len(found["weights"]) == len(expected["weights"])
    for ours, theirs, update in zip(found["weights"], expected["weights"], moved, strict=True):
        assert distance(ours, theirs) <= weights * update
    assert distance(found["siamese"], expected["siamese"]) <= weights * moved[-1]
    assert found["optimizer"].keys() == expected["optimizer"].keys()
    for name, theirs in expected["optimizer"].items():
        difference = (found["optimizer"][name] - theirs).norm()
        assert difference <= state * theirs.norm(), name
    for ours, theirs in zip(found["metrics"], expected["metrics"], strict=True):
        assert ours.keys() == theirs.keys() == {"format", *METRICS}
        for name in METRICS.keys() - {*OF_THE_MACHINE, *OF_THE_DIVISION, *OF_DIVIDED_PROMPTS}:
            assert_like(ours[name], theirs[name], metrics, name)
        assert sum(ours[name] for name in OF_DIVIDED_PROMPTS) == sum(theirs[name] for name in OF_DIVIDED_PROMPTS)
        assert ours["trained_tokens"] >= theirs["trained_tokens"]
    for ours, theirs in zip(found["evaluations"], expected["evaluations"], strict=True):
        assert_like(without([ours], "seconds"), without([theirs], "seconds"), 0, "evaluation")
    assert found["samples"] == expected["samples"]
    assert len(found["samples"]) == sum(line["prompts"] for line in expected["metrics"])
    for name, value in expected["cursor"].items():
        ours = found["cursor"][name]
        if name == "totals":
            ours, value = without([ours, value], *OF_DIVIDED_PROMPTS)
        assert_like(ours, value, metrics, name)
    assert found["checkpoints"] == expected["checkpoints"]


def distance(one, other):
    assert one.keys() == other.keys()
    return float(torch.stack([(one[name] - other[name]).norm().double() for name in one]).norm())


def states(result):
    return [*result["weights"], result["siamese"], result["optimizer"]]


def without(lines, *names):
    return [{name: value for name, value in line.items() if name not in names} for line in lines]


def assert_like(found, expected, tolerance, where):
    """Floats may differ by rounding; everything else is equal."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_like(found[key], value, tolerance, f"{where}.{key}")
    elif isinstance(expected, list):
        for ours, theirs in zip(found, expected, strict=True):
            assert_like(ours, theirs, tolerance, where)
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance), (where, found, expected)
    else:
        assert found == expected, where
