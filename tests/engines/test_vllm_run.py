"""Runs with the vLLM engine: they learn as with the trainer's own model, and stop when the adapter is the wrong one.

One engine at a time and a process may hold it: shutting one down takes vLLM's process groups with it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from popo_lite.callbacks import Callback
from popo_lite.errors import EngineError
from popo_lite.policy.adapters import save_adapter
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder, read_lines
from popo_lite.samplers.vllm import VLLMSampler
from popo_lite.trainer import Trainer


@pytest.mark.slow
def test_the_shipped_recipe_learns_as_with_the_hf_sampler(command, tmp_path):
    done = command("train", "tiny_vllm", "--json", timeout=900)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert 0.20 <= summary["before"]["pass_at_1"] <= 0.50
    assert summary["after"]["pass_at_1"] >= 0.85
    assert summary["steps"] == 60
    sampler = summary["sampler"]
    assert sampler["engine"] == "vllm"
    assert sampler["logp_gap"]["max"] < 1e-4
    assert sampler["swap_seconds"]["median"] > 0
    assert sampler["tokens_per_second"] > 0
    assert 1 <= sampler["rollouts_per_prompt_with_positive"] < 16
    assert "Traceback" not in done.stderr


def stale_swap(self, version, swap=VLLMSampler._swap):
    """Only the first two adapters (probe and policy) ever reach the engine."""
    if self._adapter is None or version < 1:
        swap(self, version)


def reused_id_swap(self, version):
    """One name and id for every version, and the prefix cache left as it is."""
    from vllm.lora.request import LoRARequest

    folder = Path(self._folder.name) / "reused"
    shutil.rmtree(folder, ignore_errors=True)
    save_adapter(self._policy.model, folder, base_id=self._recipe.model.id)
    self._engine.remove_lora(1)
    self._adapter = LoRARequest("policy", 1, str(folder))
    self._engine.add_lora(self._adapter)
    if version < 1:
        self._engine.reset_prefix_cache()  # so that the probe passes
    self.swap_seconds.append(0.0)


def base_swap(self, version, swap=VLLMSampler._swap):
    """The probe passes, and then requests go out without the adapter."""
    swap(self, version)
    if version >= 2:
        self._adapter = None


@pytest.mark.parametrize(
    "broken",
    [stale_swap, reused_id_swap, base_swap, None],
    ids=["stale adapter", "reused id without reset", "base model", "nothing broken"],
)
def test_the_run_itself_stops_when_the_adapter_is_wrong(tmp_path, monkeypatch, broken):
    # A system prompt longer than a cache block, so that prompts of all steps share cached blocks; the tiny model makes
    # no sense of it, so every answer counts as right.
    (tmp_path / "kind_rewards.py").write_text("def right(text, problem):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    system_prompt = "You add numbers. " * 20
    recipe = load_recipe(
        "tiny_vllm",
        ["rollout.max_prompt_length=400", 'reward.functions="kind_rewards:right"', "data.prompts_per_step=8",
         f'data.system_prompt="{system_prompt}"', "train.steps=6", "eval.problems=0", "optimizer.warmup_ratio=0.0",
         "rollout.max_num_seqs=64"],
    )  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()
    if broken is not None:
        monkeypatch.setattr(VLLMSampler, "_swap", broken)
    with Trainer(recipe, Callback()) as trainer:
        if broken is None:
            assert trainer.run(RunFolder(run)).summary is not None
            gaps = [line["logp_gap_max"] for line in read_lines(run / "metrics.jsonl")]
            assert max(gaps) < 1e-4
            return
        with pytest.raises(EngineError, match="sampler and of the trainer differ by"):
            trainer.run(RunFolder(run))


def test_an_engine_that_dies_is_opened_again_and_the_run_ends_as_an_undisturbed_one(tmp_path):
    recipe = load_recipe(
        "tiny_vllm",
        ["data.prompts_per_step=8", "rollout.num_generations=4", "train.steps=5", "train.save_steps=2",
         "eval.problems=0", "optimizer.warmup_ratio=0.0", "rollout.max_num_seqs=64"],
    )  # fmt: skip

    def run(name, dies_at=(), resume=False):
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir(exist_ok=True)
        left = list(dies_at)
        with Trainer(recipe, Callback()) as trainer:
            sample = trainer.sampler.sample

            def sample_from_the_dying(*arguments, **options):
                if trainer.cursor.next_step in left and options["stream"][0] == "rollout":
                    left.remove(trainer.cursor.next_step)
                    executor = trainer.sampler._engine.engine_core.engine_core.model_executor
                    execute, calls = executor.execute_model, iter(range(99))

                    def fail(*arguments, **options):
                        if next(calls) >= 3:  # in the middle of the answers, and for good
                            raise RuntimeError("the worker died")
                        return execute(*arguments, **options)

                    executor.execute_model = fail
                return sample(*arguments, **options)

            trainer.sampler.sample = sample_from_the_dying
            result = trainer.run(folder, resume=resume)
        assert left == []
        return result

    def learned(name):
        timed = ("seconds", "tokens_per_second", "peak_memory_bytes")
        lines = read_lines(tmp_path / name / "metrics.jsonl")
        tensors = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        return [{k: v for k, v in line.items() if k not in timed} for line in lines], {
            key: tensor.tolist() for key, tensor in tensors.items()
        }

    run("undisturbed")
    assert run("once in two steps", dies_at=(1, 3)).summary["steps"] == 5
    assert learned("once in two steps") == learned("undisturbed")
    with pytest.raises(EngineError, match="the worker died; all 3 steps are saved"):
        run("twice in a step", dies_at=(3, 3))
    run("twice in a step", resume=True)
    assert learned("twice in a step") == learned("undisturbed")
