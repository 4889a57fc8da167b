"""A run with a real vLLM server that samples the next step while one trains."""

from __future__ import annotations

import threading

import pytest

from engines.test_server import TOKEN, Server, free_urls
from popo_lite.callbacks import Callback
from popo_lite.policy.load import write_dequantized_base
from popo_lite.policy.policy import load_policy
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder, read_lines
from popo_lite.trainer import Trainer


@pytest.mark.slow
def test_the_server_samples_the_next_step_while_one_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("POPO_SERVER_TOKEN", TOKEN)
    (url,) = free_urls(1)
    recipe = load_recipe("tiny_cpu", [
        'rollout.engine="server"', f'rollout.server.base_urls=["{url}"]',
        f'rollout.server.shared_dir="{tmp_path / "shared"}"', "rollout.async_level=1", "rollout.max_num_seqs=16",
        "objective.importance_sampling_clip_max=2.0", "data.prompts_per_step=4", "rollout.num_generations=8",
        "train.steps=5", "train.save_steps=3", "eval.problems=0", "optimizer.warmup_ratio=0.0",
    ])  # fmt: skip
    policy = load_policy(recipe)
    write_dequantized_base(policy, tmp_path / "base")
    policy.tokenizer.save_pretrained(tmp_path / "base")
    server, run = Server(recipe, url, tmp_path / "base", tmp_path / "log"), RunFolder(tmp_path / "run")
    run.path.mkdir()
    overlapped = []
    try:
        server.start()
        server.wait()
        with Trainer(recipe, Callback()) as trainer:
            draw, backward = trainer.sampler.draw, trainer.learner.backward
            drawn = threading.Event()

            def draws(*arguments, **options):
                result = draw(*arguments, **options)
                drawn.set()
                return result

            def updates(*arguments, **options):
                if trainer.cursor.next_step in (0, 1, 3):
                    overlapped.append(drawn.wait(120))  # the server answers while the step is in its update
                return backward(*arguments, **options)

            start = trainer.rollouts.start
            trainer.sampler.draw, trainer.learner.backward = draws, updates
            trainer.rollouts.start = lambda *arguments: (drawn.clear(), start(*arguments))
            assert trainer.run(run).summary is not None
        assert server.adapters() == []
    finally:
        server.kill()
    lines = read_lines(run.metrics_path)
    assert [line["lag"] for line in lines] == [0, 1, 1, 0, 1]
    assert overlapped == [True] * 3
    # Log-probs of the adapter before the update.
    for line in lines:
        assert (line["logp_gap_max"] < 1e-4) == (line["lag"] == 0)
