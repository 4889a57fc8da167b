"""Batching, schedule, checkpoints, run folders, interrupts, and pass@k."""

from __future__ import annotations

import itertools
import os
import signal
import stat
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from helpers import json_lines
from popo_lite.checkpoint import (
    Cursor,
    load_checkpoint,
    save_checkpoint,
)
from popo_lite.curriculum import Seen
from popo_lite.errors import CheckpointError, PopoError, StopRequested, UserInputError
from popo_lite.evaluation import pass_at_k
from popo_lite.formats import read_json
from popo_lite.interrupts import Interrupts
from popo_lite.micro_batches import collate, pack
from popo_lite.policy.policy import load_policy
from popo_lite.recipe import OptimizerRecipe
from popo_lite.run_folder import (
    RunFolder,
    append_line,
    checkpoint_folders,
    environment,
    keep_lines,
    new_run,
    start_files,
    write_json,
)
from popo_lite.types import Completion, FinishReason, Group, Outcome, Problem, Prompt, Reward, Rollout
from popo_lite.update import Learner, build_optimizer, learning_rate_factor, move_state, set_learning_rate

CURSOR = Cursor(
    next_step=3,
    evaluated=0,
    next_problem=40,
    history={"p": Seen(8, 0, 1), "q/2": Seen(4, 4, 2)},
    entropy_coef=0.02,
    start_entropy=0.5,
    start_shapes={"_ is larger than _.": 3, "": 1},
    shape_steps={"_ is larger than _.": 2},
    totals={"prompts_skipped": 1, "rollouts": 24},
    seconds={"update": 1.5},
    lowered_budget=(4096, 2000),
    changes=[{"key": "rollout.engine", "before": "vllm", "now": "hf", "step": 2}],
    best={"step": 2, "pass_at_1": 0.5},
    recent_grad_norms=[0.1, 0.25],
    learning_rate_scale=0.5,
)


def rollout(prompt: int, answer: int, problem: str = "p", index: int = 0, version: int = 0) -> Rollout:
    return Rollout(
        prompt=Prompt(
            problem=Problem(id=problem, messages=({"role": "user", "content": "?"},), answer="1"),
            token_ids=tuple(range(10, 10 + prompt)),
        ),
        completion=Completion(
            token_ids=tuple(range(50, 50 + answer)),
            sampler_logps=(-0.5,) * answer,
            finish_reason=FinishReason.STOP,
            text="",
        ),
        reward=Reward(value=1.0, outcome=Outcome.CORRECT, positive=True),
        policy_version=version,
        index=index,
    )


def test_groups_refuse_what_does_not_belong_together():
    with pytest.raises(PopoError, match="one prompt"):
        Group(rollouts=(rollout(2, 2, "a"), rollout(2, 2, "b")))
    with pytest.raises(PopoError, match="one policy version"):
        Group(rollouts=(rollout(2, 2), rollout(2, 2, version=1)))


def test_a_completion_needs_a_log_prob_for_every_token():
    with pytest.raises(PopoError, match="3 tokens came with 2"):
        Completion(token_ids=(1, 2, 3), sampler_logps=(0.0, 0.0), finish_reason=FinishReason.STOP, text="")


def test_micro_batches_hold_everything_once_and_keep_the_budget():
    rollouts = [rollout(5, answer) for answer in (1, 30, 7, 8, 22, 2, 15, 40)]
    packed = pack(rollouts, range(8), budget_tokens=90, shared_prefix=False)
    batches = [members for _, members in packed]
    assert sorted(itertools.chain(*batches)) == list(range(8))
    assert all(sum(rollouts[i].tokens for i in batch) <= 90 for batch in batches)
    assert len(batches) == 2  # 165 tokens, and no padding
    assert sum(tokens for tokens, _ in packed) == sum(one.tokens for one in rollouts)
    assert pack(rollouts, [3, 1], budget_tokens=90, shared_prefix=False) == [(48, [1, 3])]


def test_answers_to_a_prompt_share_it_and_are_parted_only_if_they_must_be():
    rollouts = [rollout(prompt, answer) for prompt, answer in ((5, 8), (6, 30), (5, 9), (6, 4), (5, 2))]

    packed = partial(pack, rollouts, range(5), shared_prefix=True)
    whole = [(64, [1, 3, 2, 0, 4])]  # 5 + 8 + 9 + 2 and 6 + 30 + 4, where whole sequences take 80
    assert packed(budget_tokens=64) == whole
    assert packed(budget_tokens=40) == [(40, [1, 3]), (24, [2, 0, 4])]
    assert packed(budget_tokens=36) == [(36, [1]), (34, [2, 0, 4, 3])]  # one prompt is repeated
    assert packed(budget_tokens=16) == [(36, [1]), (16, [2, 4]), (13, [0]), (10, [3])]


def test_a_sequence_beyond_a_lowered_budget_goes_alone():
    rollouts = [rollout(5, answer) for answer in (40, 1, 2)]
    assert pack(rollouts, range(3), budget_tokens=20, shared_prefix=False) == [(45, [0]), (13, [2, 1])]
    assert pack(rollouts, range(3), budget_tokens=20, shared_prefix=True) == [(45, [0]), (8, [2, 1])]


def test_collate_points_at_the_right_positions():
    rollouts = [rollout(3, 2), rollout(2, 4), rollout(3, 1)]
    batch = collate(rollouts, (1, 0, 2), device=torch.device("cpu"), shared_prefix=True)
    assert batch.members == (1, 0, 2)
    assert batch.input_ids.tolist() == [10, 11, 50, 51, 52, 53, 10, 11, 12, 50, 51, 50]
    assert batch.row == ((2, 4), (3, 2, 1))
    assert batch.lengths == (4, 2, 1)
    assert batch.targets.tolist() == [50, 51, 52, 53, 50, 51, 50]
    assert batch.predicting(batch.input_ids[:, None]).flatten().tolist() == [11, 50, 51, 52, 12, 50, 12]
    assert batch.sequence_of_token.tolist() == [0, 0, 0, 0, 1, 1, 2]
    hidden = torch.arange(12.0)[:, None]
    assert batch.mean_features(hidden).tolist() == [[(2 + 3 + 4 + 5) / 4], [(9 + 10) / 2], [11]]
    assert [part.tolist() for part in batch.by_sequence(torch.arange(7.0))] == [[0, 1, 2, 3], [4, 5], [6]]
    apart = collate(rollouts, (0, 2), device=torch.device("cpu"), shared_prefix=False)
    assert apart.row == ((3, 2), (3, 1))
    assert apart.input_ids.tolist() == [10, 11, 12, 50, 51, 10, 11, 12, 50]


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_equal_answers_to_a_prompt_are_there_once(shared_prefix):
    rollouts = [rollout(3, 2), rollout(3, 1), rollout(3, 2, index=2)]
    batch = collate(rollouts, (0, 1, 2), device=torch.device("cpu"), shared_prefix=shared_prefix)
    once = [10, 11, 12, 50, 51, 50]
    assert batch.input_ids.tolist() == (once if shared_prefix else [10, 11, 12, 50, 51, 10, 11, 12, 50, *once[:5]])
    assert batch.targets.tolist() == [50, 51, 50, 50, 51]
    assert batch.lengths == (2, 1, 2)
    assert batch.predicting(batch.input_ids[:, None]).flatten().tolist() == [12, 50, 12, 12, 50]
    assert batch.mean_features(batch.input_ids[:, None].float()).flatten().tolist() == [50.5, 50, 50.5]
    assert sum(tokens for tokens, _ in pack(rollouts, range(3), budget_tokens=99, shared_prefix=True)) == 8


def test_features_of_16_bit_states_are_summed_in_float32():
    batch = collate([rollout(3, 300)], (0,), device=torch.device("cpu"), shared_prefix=True)
    hidden = torch.rand(303, 4).bfloat16()
    found = batch.mean_features(hidden)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found[0], hidden[3:].double().mean(dim=0).float(), rtol=1e-6, atol=0)


def test_learning_rate():
    cosine = OptimizerRecipe(warmup_ratio=0.1)
    factors = [learning_rate_factor(step, 100, cosine) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] < 0.001
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert learning_rate_factor(55, 100, OptimizerRecipe(schedule="linear")) == pytest.approx(0.5)
    assert learning_rate_factor(99, 100, OptimizerRecipe(schedule="constant")) == 1.0
    assert learning_rate_factor(0, 1, OptimizerRecipe(warmup_ratio=0.0)) == 1.0


def test_head_and_adapters_have_their_own_rates(tiny_recipe):
    policy = load_policy(tiny_recipe())
    recipe = OptimizerRecipe(learning_rate=0.5, head_learning_rate=0.25, weight_decay=0.1)
    optimizer = build_optimizer(policy, recipe)
    set_learning_rate(optimizer, 0.5)
    by_tensor = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(by_tensor) == len(policy.trainable_parameters())
    for name, parameter in policy.trainable_parameters():
        group = by_tensor[id(parameter)]
        assert group["lr"] == (0.125 if name.startswith("predictor.") else 0.25)
        assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)


def learner_of(recipe):
    return Learner(recipe, load_policy(recipe), notify=pytest.fail, memory_advice=pytest.fail)


def one_update(learner, seed):
    torch.manual_seed(seed)
    for _, parameter in learner.policy.trainable_parameters():
        parameter.grad = torch.randn_like(parameter)
    learner.optimizer.step()
    learner.siamese.update(1.0 + seed)
    learner.policy.version += 1


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_checkpoint_brings_everything_back(tiny_recipe, tmp_path, name):
    """Two updates, a checkpoint, two more; and the last two again from the checkpoint: bit for bit the same."""

    def fresh():
        return learner_of(tiny_recipe(f'optimizer.name="{name}"', "siamese.head_width=64"))

    learner, other = fresh(), fresh()
    for seed in (0, 1):
        one_update(learner, seed)
    folder = save_checkpoint(tmp_path, learner, CURSOR, base_id="tiny", keep=2)
    assert load_checkpoint(folder, other) == CURSOR
    assert other.policy.version == 2
    for seed in (2, 3):
        one_update(learner, seed)
        one_update(other, seed)
    weights = [one.policy.trainable_parameters() for one in (learner, other)]
    for (key, ours), (_, theirs) in zip(*weights, strict=True):
        assert torch.equal(ours, theirs), key
    for key, tensor in learner.siamese.average.items():
        assert torch.equal(tensor, other.siamese.average[key]), key
    assert learner.siamese.drift_bound() == other.siamese.drift_bound()


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_state_that_is_moved_away_and_back_is_the_same_state(tiny_recipe, name):
    """Optimizers must find their state under the same keys after every tensor of it was replaced by a moved copy."""
    outcomes = []
    for moves in (False, True):
        learner = learner_of(
            tiny_recipe("siamese.head_width=64", f"optimizer.name={name}", "optimizer.learning_rate=0.01")
        )
        for seed in (0, 1, 2):
            one_update(learner, seed)
            if moves:
                for state in learner.optimizer.state.values():
                    state.update({k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)})
                move_state(learner.optimizer, torch.device("cpu"))
        outcomes.append([p.detach().clone() for _, p in learner.policy.trainable_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_old_checkpoints_go_and_what_is_none_does_not_count(tiny_recipe, tmp_path):
    learner = learner_of(tiny_recipe())
    others = [
        ".step-000009.partial",
        "step-000001-best",
        "step-9",
        "step-000009 (copy)",
        "step-000007.old",
        ".step-notes",
    ]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "step-000008").touch()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, learner, replace(CURSOR, next_step=step), base_id="tiny", keep=2)
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step-000002", "step-000003"]
    best = replace(CURSOR, best={"step": 2, "pass_at_1": 0.9})
    for step in (4, 5, 1_000_000):
        save_checkpoint(tmp_path, learner, replace(best, next_step=step), base_id="tiny", keep=2)
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step-000002", "step-000005", "step-1000000"]
    assert all((tmp_path / name).exists() for name in others[1:])
    assert not (tmp_path / ".step-000009.partial").exists()
    assert not any(file.suffix in (".pt", ".bin", ".pkl") for file in tmp_path.rglob("*"))
    assert checkpoint_folders(tmp_path / "nothing") == []


def test_a_repeated_checkpoint_brings_the_cursor_up_to_date(tiny_recipe, tmp_path):
    learner = learner_of(tiny_recipe())
    for before in (None, {"pass_at_1": 0.3}):
        folder = save_checkpoint(tmp_path, learner, replace(CURSOR, before=before), base_id="tiny", keep=2)
    assert load_checkpoint(folder, learner).before == {"pass_at_1": 0.3}


def test_run_folders_are_private_and_never_overwritten(tiny_recipe, tmp_path):
    recipe, paths = tiny_recipe(f'output.dir="{tmp_path / "runs"}"'), []
    for _ in range(2):
        with new_run(recipe, "tiny", None) as run:
            start_files(run, recipe, torch.device("cpu"))
        paths.append(run.path)
    assert [path.name for path in paths] == ["tiny-seed0", "tiny-seed0-2"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o700, 0o700]
    with pytest.raises(UserInputError, match="no run is ever overwritten") as caught, new_run(recipe, "x", paths[0]):
        pass
    assert caught.value.next_step.startswith(f"popo-lite resume {paths[0]} continues it")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(UserInputError, match="not empty"), new_run(recipe, "x", tmp_path / "notes"):
        pass


@pytest.mark.parametrize("named", [True, False])
def test_a_run_that_cannot_start_leaves_nothing_behind(tiny_recipe, tmp_path, named):
    recipe, output = tiny_recipe(f'output.dir="{tmp_path / "a" / "b"}"'), tmp_path / "a" / "b" / "tiny-seed0"
    with pytest.raises(ZeroDivisionError), new_run(recipe, "tiny", output if named else None):
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()
    output.mkdir(parents=True)  # killed while it loaded
    (output / ".lock").touch()
    with pytest.raises(ZeroDivisionError), new_run(recipe, "tiny", output if named else None) as run:
        assert run.path == output
        raise ZeroDivisionError
    assert list(output.iterdir()) == []


def test_the_environment_of_the_start_is_kept(tiny_recipe, tmp_path):
    run, cpu = RunFolder(tmp_path), torch.device("cpu")
    assert start_files(run, tiny_recipe(), cpu) == []
    assert read_json(run.environment_path)["packages"]["torch"] == version("torch")
    before = read_json(run.environment_path)
    write_json(run.environment_path, before | {"packages": before["packages"] | {"torch": "2.0"}})
    assert start_files(run, tiny_recipe(), cpu) == [f"packages.torch was '2.0' and is '{version('torch')}'"]
    assert read_json(run.environment_path)["packages"]["torch"] == "2.0"


def test_a_folder_that_is_no_run_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="there is no run here"):
        RunFolder(tmp_path).recipe()


@pytest.mark.parametrize("torn", [b"", b'{"step": 5, "lo', '{"step": 5, "text": "é'.encode()[:-1], b"\0\0\0"])
def test_lines_of_steps_to_be_repeated_go(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    for step in range(5):
        append_line(path, {"step": step})
    separators = "one\u2028line\x85still"
    append_line(path, {"step": 0, "text": separators})
    with path.open("ab") as file:
        file.write(torn)
    keep_lines(path, lambda line: line["step"] < 3)
    keep_lines(tmp_path / "absent.jsonl", lambda _: True)
    assert json_lines(path).pop()["text"] == separators
    assert [line["step"] for line in json_lines(path)] == [0, 1, 2, 0]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}')
    keep_lines(path, lambda _: True)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


@pytest.mark.parametrize("corrupt", [b'{"step": 5, "lo', b'{"step": "\xc3"}', b"5"])
def test_a_corrupt_line_that_is_not_the_last_is_no_kills_work(tmp_path, corrupt):
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 0}\n' + corrupt + b'\n{"step": 1}\n'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="line 2 is damaged") as caught:
        keep_lines(path, lambda _: True)
    assert caught.value.where == str(path)
    assert path.read_bytes() == content


def test_signals_are_noted_and_raise_only_in_check():
    messages = []
    before = signal.getsignal(signal.SIGINT)
    with Interrupts(messages.append) as interrupts:
        interrupts.check()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.requested
        interrupts.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopRequested):
            interrupts.check()
    assert len(messages) == 1
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("samples", "right"), [(1, 0), (1, 1), (8, 0), (8, 1), (8, 5), (8, 8), (10, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples, right):
    answers = [True] * right + [False] * (samples - right)
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(answers, k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 2, 5), (4, 5, 1), (4, -1, 1), (4, 2, 0)])
def test_pass_at_k_refuses_nonsense(samples, right, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(samples, right, k)


def test_a_run_on_a_gpu_names_it(monkeypatch):
    card = SimpleNamespace(name="a card", total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert environment(torch.device("cuda"))["gpu"] == {
        "name": "a card",
        "memory_bytes": 24 * 2**30,
        "cuda": torch.version.cuda,
    }
    assert environment(torch.device("cpu"))["gpu"] is None
