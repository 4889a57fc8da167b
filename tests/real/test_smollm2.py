"""The real command on a real model: from a GGUF file by NF4 and LoRA to merged folders and GGUF files again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from helpers import json_lines
from popo_lite.policy.policy import Policy, load_policy, load_trained_policy
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder
from popo_lite.tasks import open_tasks
from popo_lite.tasks.rendering import Renderer
from popo_lite.tools.export.verify import greedy

STEPS = 5


def run_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "popo_lite", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return done


def train(model: Path, folder: Path, *overrides: str) -> RunFolder:
    settings = [f"model.id={model}", f"train.steps={STEPS}", "train.cpu_threads=1", "data.prompts_per_step=2",
                "train.save_steps=3", "eval.problems=16", *overrides]  # fmt: skip
    options = [part for setting in settings for part in ("--set", setting)]
    run_command("train", "smollm2_135m", *options, "--output", folder)
    return RunFolder(folder)


@pytest.fixture(scope="module")
def run(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(smollm2, tmp_path_factory.mktemp("smollm2") / "run")


@pytest.fixture(scope="module")
def recipe(run: RunFolder) -> Recipe:
    return run.recipe()


@pytest.fixture(scope="module")
def policy(run: RunFolder, recipe: Recipe) -> Policy:
    """The trained policy."""
    return load_trained_policy(recipe, run.adapter)


def test_the_model_is_what_its_makers_say(policy: Policy, recipe: Recipe) -> None:
    assert policy.quantized_modules == 7 * 30
    config: Any = policy.model.get_base_model().config
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (576, 9, 3)
    assert policy.tokenizer.eos_token == "<|im_end|>"
    assert policy.stop_ids == {2}
    assert policy.packing == "sdpa"
    assert policy.tokenizer.tokenize("In 2024, 3.14 is") == ["In", "Ġ", "2", "0", "2", "4", ",", "Ġ", "3", ".", "1",
                                                            "4", "Ġis"]  # fmt: skip
    renderer = Renderer(recipe, policy.tokenizer)
    problem = open_tasks(recipe)[0].held_out(1)[0]
    assert policy.tokenizer.decode(renderer.token_ids(problem)) == (
        "<|im_start|>system\nYou reply with the larger number.<|im_end|>\n<|im_start|>user\n3.45 or 3.6?<|im_end|>\n"
        "<|im_start|>assistant\n3.6<|im_end|>\n<|im_start|>user\n52 or 17?<|im_end|>\n<|im_start|>assistant\n"
        f"52<|im_end|>\n<|im_start|>user\n{problem.question}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_it_knows_something(policy: Policy) -> None:
    """The weights are those of a language model, in the right places."""
    text = "The capital of France is Paris, and the capital of Germany is Berlin."
    ids = torch.tensor(policy.tokenizer.encode(text))
    with policy.model.disable_adapter(), torch.no_grad():
        logps = policy.head.logits(policy.hidden_states(ids, [[len(ids)]])).log_softmax(-1)
    assert float(logps[:-1].gather(-1, ids[1:, None]).mean()) > -3.0  # nats a token; at random it would be -10.8


def test_sampler_and_trainer_agree(run: RunFolder) -> None:
    steps = json_lines(run.metrics_path)
    assert len(steps) == STEPS
    assert sum(step["positives"] for step in steps) > 0
    gaps = [step["logp_gap_max"] for step in steps if step["logp_gap_max"] is not None]
    assert 0 < max(gaps) < 1e-3


def test_right_answers_become_likelier(run: RunFolder, policy: Policy, recipe: Recipe) -> None:
    """The answers that were trained on, among those that the run kept."""
    questions = {p.id: p for p in (open_tasks(recipe)[0].train_problem(recipe.train.seed, i) for i in range(2 * STEPS))}
    positives = {
        (group["problem"], answer["text"].strip())
        for group in json_lines(run.samples_path)
        for answer in group["answers"]
        if answer["reward"] == 1.0
    }
    assert positives
    renderer = Renderer(recipe, policy.tokenizer)

    @torch.no_grad()
    def mean_logp() -> float:
        total = []
        for problem, text in sorted(positives):
            prompt = renderer.token_ids(questions[problem])
            ids = torch.tensor([*prompt, *policy.tokenizer.encode(text), policy.tokenizer.eos_token_id])
            states = policy.hidden_states(ids, [[len(ids)]])[len(prompt) - 1 : -1]
            total.append(policy.head.logits(states).log_softmax(-1).gather(-1, ids[len(prompt) :, None]).sum())
        return float(torch.stack(total).mean())

    trained = mean_logp()
    with policy.model.disable_adapter():
        assert trained > mean_logp() + 0.1


def test_a_run_continued_ends_bit_for_bit_the_same(run: RunFolder, smollm2: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(run.path, folder)
    for step in (folder / "checkpoints").iterdir():
        if step.name != "step-000003":
            shutil.rmtree(step)
    for name in ("summary.json", "adapter", "siamese"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_command("resume", folder)
    before, after = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (run.path, folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def export(run: RunFolder, output: Path, *options: str) -> dict[str, Any]:
    report = run_command(
        "export", run.path, *options, "--prompts", "16", "--problems", "0", "--output", output, "--json"
    )
    return dict(json.loads(report.stdout)["verification"])


def test_both_bases_are_exported_and_told_apart(run: RunFolder, tmp_path: Path) -> None:
    found = export(run, tmp_path / "merged")
    assert found["greedy_agreement"] == 1.0
    assert found["mean_difference"] < 1e-4
    # NF4's rounding is much of what the original weights would change.
    assert found["other_base"]["merged_base"] == "original"
    assert found["other_base"]["mean_difference"] > 100 * found["mean_difference"]
    merged = load_policy(load_recipe(run.recipe_path, [f'model.id="{tmp_path / "merged"}"', "model.quantization=none"]))
    assert merged.quantized_modules == 0


def test_gguf_goes_out_as_it_came_in(run: RunFolder, tmp_path: Path) -> None:
    kind = "q8_0"
    found = export(run, tmp_path / kind, "--gguf", kind)
    assert found["greedy_agreement"] >= 0.9
    assert found["mean_difference"] < 0.1
    # llama.cpp itself reads the file, splits text into the same tokens, and answers the same. It also rounds the
    # activations to 8 bits, which was seen to change a log-prob by 0.15.
    lines = subprocess.run(
        [sys.executable, Path(__file__).with_name("llama_cpp.py"), tmp_path / kind / f"model-{kind}.gguf"],
        input=json.dumps(TEXTS), capture_output=True, text=True, timeout=300, check=True)  # fmt: skip
    theirs = json.loads(lines.stdout.splitlines()[-1])
    adapted = load_trained_policy(run.recipe(), run.adapter)
    for text, answer in zip(TEXTS, theirs, strict=True):
        ids = adapted.tokenizer.encode(text)
        assert answer["prompt_tokens"] == len(ids)
        output = adapted.model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, eos_token_id=2)
        logits = adapted.model(output).logits[0].log_softmax(-1)
        for place, token in enumerate(output[0, len(ids) :].tolist()[:2], len(ids) - 1):
            assert token == answer["ids"][place - len(ids) + 1]
            assert float(logits[place, token]) == pytest.approx(answer["logps"][place - len(ids) + 1], abs=0.3)


TEXTS = [
    "<|im_start|>user\n1.25 or 1.3?<|im_end|>\n<|im_start|>assistant\n",
    "The capital of France is",
    "Größe: 1234 + 56.7 =",
]


@pytest.mark.vllm
def test_vllm_samples_the_same_policy(smollm2: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    run = train(smollm2, tmp_path / "run", "rollout.engine=vllm", "train.steps=2", "eval.problems=8")
    gaps = [step["logp_gap_mean"] for step in json_lines(run.metrics_path) if step["logp_gap_mean"] is not None]
    assert 0 < max(gaps) < 1e-3


PROBLEMS = int(os.environ.get("POPO_SERVED_PROBLEMS", "24"))


@pytest.mark.vllm
def test_a_merged_model_behind_vllm_answers_as_the_policy(run: RunFolder, policy: Policy, tmp_path: Path) -> None:
    """Asked by OpenAI's client: chat template, stop token and weights are in the folder."""
    pytest.importorskip("vllm")
    from openai import OpenAI

    export(run, tmp_path / "merged", "--dtype", "float32")
    recipe = run.recipe()
    problems = open_tasks(recipe)[0].held_out(PROBLEMS)
    prompts = [Renderer(recipe, policy.tokenizer).token_ids(problem) for problem in problems]
    answers = greedy(policy.model.get_base_model(), prompts, policy.stop_ids, 8)
    with serving(tmp_path / "merged", tmp_path / "log") as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        same = 0
        for problem, answer in zip(problems, answers, strict=True):
            messages: Any = [*map(dict, problem.messages)]
            reply = client.chat.completions.create(model="merged", messages=messages, temperature=0, max_tokens=8)
            same += reply.choices[0].message.content == policy.tokenizer.decode(answer, skip_special_tokens=True)
    assert same >= 0.95 * PROBLEMS, f"{same} of {PROBLEMS}"


@contextmanager
def serving(folder: Path, log: Path) -> Iterator[str]:
    """The URL of a vLLM server of the model in `folder`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
                   "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    options = ["--model", folder, "--served-model-name", "merged", "--dtype", "float32", "--max-model-len", "512",
               "--enforce-eager", "--port", str(port)]  # fmt: skip
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options],
            env={**os.environ, **environment}, stdout=output, stderr=output, start_new_session=True)  # fmt: skip
    try:
        url, limit = f"http://127.0.0.1:{port}", time.monotonic() + 600
        while server.poll() is None and time.monotonic() < limit:
            with suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                    yield url
                    return
            time.sleep(0.5)
        pytest.fail(log.read_text()[-3000:])
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
