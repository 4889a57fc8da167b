"""`export_run`: what it writes, whether that is the trained policy, and what it refuses."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard, ModelCardData
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

import popo_lite
from popo_lite.cli import main
from popo_lite.errors import CheckpointError, ExportError, UserInputError
from popo_lite.policy.adapters import ADAPTER_FILE
from popo_lite.policy.load import TINY_FOLDER
from popo_lite.policy.policy import load_policy, load_trained_policy
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import load_recipe, shipped_recipes, to_toml
from popo_lite.run_folder import RunFolder
from popo_lite.tasks import open_tasks
from popo_lite.tasks.rendering import Renderer
from popo_lite.tools.benchmarks import subject
from popo_lite.tools.export import folder, pipeline
from popo_lite.tools.export.card import model_card
from popo_lite.tools.export.pipeline import export_run
from popo_lite.tools.public import is_local, known_as
from runs import SUMMARY, finished_run

PLAIN = "model.quantization=none"


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run on an unquantised base, which no test changes."""
    return finished_run(tmp_path_factory.mktemp("plain") / "run", PLAIN)


@pytest.fixture(scope="module")
def nf4_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run on an NF4 base, which no test changes."""
    return finished_run(tmp_path_factory.mktemp("nf4") / "run")


def dequantized_weights(dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of `tiny` after NF4 with nested scales, by bitsandbytes alone, as a run computes with them."""
    functional, weights = bitsandbytes.functional, weights_of(TINY_FOLDER)
    for name in (name for name in weights if "_proj" in name and name.endswith(".weight")):
        packed = functional.quantize_4bit(weights[name].to(dtype), quant_type="nf4", compress_statistics=True)
        weights[name] = functional.dequantize_4bit(*packed).double()
    return weights


def expected_weights(adapter: Path, base: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Merged weights from the files alone, in float64: W + s B A, or DoRA's m (W + s B A) / ||W + s B A||."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    tensors = {name: tensor.double() for name, tensor in load_file(adapter / ADAPTER_FILE).items()}
    merged = weights_of(TINY_FOLDER) if base is None else dict(base)
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        target = module.removeprefix("base_model.model.") + ".weight"
        merged[target] = merged[target] + scale * tensors[f"{module}.lora_B.weight"] @ tensors[name]
        if config["use_dora"]:
            magnitude = tensors[f"{module}.lora_magnitude_vector"]
            merged[target] *= (magnitude / merged[target].norm(dim=1))[:, None]
    return merged


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_a_merged_model_answers_as_the_trained_policy(tmp_path: Path, plain_run: RunFolder) -> None:
    run = plain_run
    report = export_run(run, output=tmp_path / "model", prompts=8, problems=0)

    recipe = run.recipe()
    policy = load_trained_policy(recipe, run.adapter)
    renderer = Renderer(recipe, policy.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(report.folder)
    model = AutoModelForCausalLM.from_pretrained(report.folder)
    assert not any("lora" in name for name in model.state_dict())
    assert model.dtype == torch.float32
    # By transformers' own generate: none of this goes through the code that verified the export.
    held_out = open_tasks(recipe)[1].held_out(40)
    same = 0
    for problem in held_out:
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in problem.messages], add_generation_prompt=True, return_dict=False
        )
        assert tuple(ids) == renderer.render(problem).token_ids
        prompt = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        ours = model.generate(**prompt, do_sample=False, max_new_tokens=64)
        theirs = policy.model.generate(**prompt, do_sample=False, max_new_tokens=64)
        same += ours.tolist() == theirs.tolist()
    assert same == len(held_out)


@pytest.mark.parametrize("adapter", ["lora.dropout=0.1", "lora.rslora=true", "lora.dora=true"])
def test_every_kind_of_adapter_merges_to_rounding(tmp_path: Path, adapter: str) -> None:
    run = finished_run(tmp_path / "run", PLAIN, adapter)
    report = export_run(run, problems=0)
    assert largest_difference(weights_of(report.folder), expected_weights(run.adapter)) < 1e-6
    found = report.verification
    assert found is not None
    assert found["pass_at_1"] is None
    assert found["prompts"] == 32
    assert found["tokens"] > 32
    assert found["greedy_agreement"] == 1.0
    assert found["mean_difference"] < 2e-6
    assert found["worst_difference"] < 1e-4
    assert found["adapter_difference"] > 0.02


def test_an_nf4_run_is_merged_into_the_base_that_it_was_trained_on(tmp_path: Path, nf4_run: RunFolder) -> None:
    report = export_run(nf4_run, output=tmp_path / "model", prompts=8, problems=16)
    expected = expected_weights(nf4_run.adapter, dequantized_weights(torch.float32))
    assert largest_difference(weights_of(report.folder), expected) < 1e-6
    assert traces(report.folder) == set(report.files)  # no temporary folder is left
    found = report.verification
    assert found is not None
    assert (report.merged_into, found["trained_base"], found["merged_base"]) == ("trained", "nf4", "trained")
    assert found["greedy_agreement"] == 1
    assert found["mean_difference"] < 1e-5
    rates, other = found["pass_at_1"], found["other_base"]
    assert (rates["problems"], rates["trained"]) == (16, rates["merged"])
    assert rates["difference_low"] < 0 < rates["difference_high"]
    assert other["merged_base"] == "original"
    assert 1e-3 < other["mean_difference"] < 0.1
    assert other["pass_at_1"]["trained"] == rates["trained"]
    card = (report.folder / "README.md").read_text()
    assert "merged into the base (NF4, dequantised) in float32" in card
    assert "| trained base | original base (not kept) |" in card
    assert f"| {found['mean_difference']:.2g} | {other['mean_difference']:.2g} |" in card
    assert "keeps more" not in card


def test_the_original_weights_can_still_be_merged_into(
    tmp_path: Path, nf4_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "OTHER_BASE_BYTES", 2**10)  # as for a large model
    written: list[Path] = []
    monkeypatch.setattr(pipeline, "write_dequantized_base", lambda _, folder: written.append(folder))
    report = export_run(nf4_run, base="original", output=tmp_path / "model", prompts=8, problems=0)
    assert largest_difference(weights_of(report.folder), expected_weights(nf4_run.adapter)) < 1e-6
    found = report.verification
    assert found is not None
    assert (report.merged_into, found["merged_base"]) == ("original", "original")
    assert "other_base" not in found
    assert written == []
    assert 1e-3 < found["mean_difference"] < 0.1
    assert "merged into the base (original weights, not NF4)" in (report.folder / "README.md").read_text()


@pytest.mark.parametrize("adapter", ["lora.dora=false", "lora.dora=true"])
def test_sixteen_bit_weights_are_rounded_once(tmp_path: Path, adapter: str) -> None:
    run = finished_run(tmp_path / "run", "model.dtype=bfloat16", adapter)
    report = export_run(run, prompts=2, problems=0)
    expected = expected_weights(run.adapter, dequantized_weights(torch.bfloat16))
    merged = weights_of(report.folder)
    different = total = 0
    for name, tensor in expected.items():
        different += int((tensor.to(torch.bfloat16) != merged[name].to(torch.bfloat16)).sum())
        total += tensor.numel()
    assert different / total < 1e-4  # only where float32's own rounding decides


def test_without_quantisation_both_bases_are_the_same(tmp_path: Path, plain_run: RunFolder) -> None:
    trained, original = (
        export_run(plain_run, base=base, output=tmp_path / base, prompts=2, problems=4)
        for base in ("trained", "original")
    )
    for file in trained.folder.iterdir():
        assert file.read_bytes() == (original.folder / file.name).read_bytes()
    assert trained.merged_into == original.merged_into == "trained"
    assert trained.verification is not None
    assert "other_base" not in trained.verification
    assert "merged into the base (float32) in float32" in (trained.folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "better"),
    [
        ("--base original --dtype bfloat16", "--dtype bfloat16 --base trained"),
        ("--dtype bfloat16", "--dtype float32"),
        ("--dtype float32", "--what adapter"),
        ("--base original --gguf q4_0", "--dtype float32 --gguf q4_0 --base trained"),
        ("--gguf q4_0 --dtype bfloat16", "--dtype bfloat16 --gguf q8_0"),
        ("--gguf q8_0", "--dtype float32 --gguf bf16"),
        ("--gguf bf16 --dtype bfloat16", "--gguf f32"),
        ("--gguf f32 --dtype bfloat16", "--gguf f32 --dtype float32"),
        ("--gguf f32", "--what adapter"),
    ],
)
def test_a_loss_beyond_chance_is_said_with_what_to_do(
    tmp_path: Path, nf4_run: RunFolder, monkeypatch: pytest.MonkeyPatch, options: str, better: str
) -> None:
    monkeypatch.setattr(pipeline, "OTHER_BASE_BYTES", 0)
    evaluate = pipeline.evaluate

    def evaluate_worse(name: str, *arguments: Any, **options: Any) -> Any:
        result = evaluate(name, *arguments, **options)
        rates = (1.0,) * 8 if name == "trained policy" else (1.0, 1.0, *[0.0] * 6)
        return dataclasses.replace(result, pass_at_1=sum(rates) / 8, pass_rates=rates)

    monkeypatch.setattr(pipeline, "evaluate", evaluate_worse)
    folder = tmp_path / "model"
    size = ["--prompts", "2", "--problems", "8", "--output", str(folder)]
    done = CliRunner().invoke(main, ["export", str(nf4_run.path), *options.split(), *size])
    assert done.exit_code == 0, done.output
    assert "lost pass@1 by more than chance: -75.0 points" in done.output
    output = f"{folder}-{better.split()[-1]}"
    assert f"popo-lite export {nf4_run.path} --weights policy {better} --output {output}\n" in done.output
    assert f"`popo-lite export RUN {better}`" in (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "q4_0"])
def test_a_gguf_file_is_checked_by_reading_it_back(tmp_path: Path, nf4_run: RunFolder, kind: str) -> None:
    report = export_run(nf4_run, output=tmp_path / "out", gguf=kind, prompts=16, problems=40)
    assert set(report.files) == {f"model-{kind}.gguf", "Modelfile", "README.md", "export.json"}
    found = report.verification
    assert found is not None
    # Half and twice of what was measured. 4 bits change half as much as the adapter.
    low, high = {"f32": (0, 1e-5), "bf16": (1e-4, 6e-4), "q8_0": (6e-4, 2.4e-3), "q4_0": (0.007, 0.03)}[kind]
    assert low <= found["mean_difference"] <= high
    assert found["worst_difference"] <= 20 * high
    assert found["greedy_agreement"] >= {"f32": 1.0, "bf16": 0.9, "q8_0": 0.9, "q4_0": 0.6}[kind]
    assert found["pass_at_1"]["problems"] == 40
    card = (report.folder / "README.md").read_text()
    assert f"llama-cli --model model-{kind}.gguf" in card
    assert "library_name: gguf" in card
    assert "from_pretrained" not in card
    # The file is a model for everything else, too: `popo-lite eval FILE --task RUN`.
    recipe = load_recipe("tiny_cpu", [f'model.id="{report.folder / f"model-{kind}.gguf"}"', PLAIN])
    assert load_policy(recipe).stop_ids == load_policy(load_recipe("tiny_cpu")).stop_ids


def test_gguf_of_a_model_or_type_that_cannot_be_written_leaves_nothing(tmp_path: Path, nf4_run: RunFolder) -> None:
    with pytest.raises(UserInputError, match='there is no GGUF type "q9"'):
        export_run(nf4_run, output=tmp_path / "out", gguf="q9")
    with pytest.raises(ExportError, match="llama-quantize, which is not on the PATH"):
        export_run(nf4_run, output=tmp_path / "out", gguf="q4_k_m")
    assert not [*tmp_path.iterdir()]


def test_sixteen_bit_answers_may_part_at_near_ties(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", PLAIN, "model.dtype=bfloat16")
    report = export_run(run, prompts=100, problems=0)
    found = report.verification
    assert found is not None
    assert report.dtype == "bfloat16"
    assert found["greedy_agreement"] < 1.0
    assert 0 < found["widest_parting"] < 0.1
    assert 1e-4 < found["mean_difference"] < 0.01


@pytest.mark.parametrize(("base", "dtype"), [(PLAIN, torch.float16), ("model.dtype=bfloat16", torch.bfloat16)])
def test_precision(tmp_path: Path, base: str, dtype: torch.dtype) -> None:
    run = finished_run(tmp_path / "run", base)
    name = str(dtype).removeprefix("torch.")
    report = export_run(run, dtype=name, prompts=4, problems=0)
    assert {tensor.dtype for tensor in load_file(report.folder / "model.safetensors").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(report.folder).dtype == dtype
    assert f") in {name}." in (report.folder / "README.md").read_text()


def test_siamese_weights(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", PLAIN)
    policy, siamese = export_run(run, prompts=4, problems=0), export_run(run, weights="siamese", prompts=4, problems=0)
    assert (policy.folder, siamese.folder) == (
        run.path / "export" / "merged-policy",
        run.path / "export" / "merged-siamese",
    )
    assert largest_difference(weights_of(siamese.folder), expected_weights(run.siamese)) < 1e-6
    assert largest_difference(weights_of(siamese.folder), weights_of(policy.folder)) > 1e-3
    assert "the siamese, which these weights are, was not measured" in (siamese.folder / "README.md").read_text()


def test_an_adapter_is_exported_as_it_was_trained(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    report = export_run(run, what="adapter", output=tmp_path / "made" / "adapter")
    assert (report.dtype, report.verification) == (None, None)
    assert (report.folder / ADAPTER_FILE).read_bytes() == (run.adapter / ADAPTER_FILE).read_bytes()
    config = json.loads((report.folder / "adapter_config.json").read_text())
    assert config == json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert {"README.md", "export.json", "tokenizer.json", "chat_template.jinja"} <= report.files.keys()
    card = ModelCard.load(report.folder / "README.md")
    assert card.data.library_name == "peft"
    assert "It belongs to the base in NF4" in card.text
    assert "bnb_4bit_compute_dtype=torch.float32" in card.text


def test_the_example_of_an_adapter_reads_a_base_that_is_a_gguf_file(
    tmp_path: Path, nf4_run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = export_run(nf4_run, output=tmp_path / "merged", gguf="f32", prompts=2, problems=0)
    file = merged.folder / "model-f32.gguf"
    report = export_run(finished_run(tmp_path / "run", f"model.id={file}"), what="adapter")
    code = (report.folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert 'from_pretrained(gguf_folder(Path("path/to/model-f32.gguf"), "float32"), quantization_config=nf4' in code
    code = code.replace("path/to/this/folder", str(report.folder)).replace("path/to/model-f32.gguf", str(file))
    exec(code, {})  # noqa: S102 - the card's own
    assert "\\boxed{" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- a base of one's own


@pytest.fixture
def local_base(tmp_path: Path) -> Path:
    """The model `tiny` as somebody's own: two stop tokens, sampling settings as some bases have them, a licence."""
    folder = tmp_path / "secret-place" / "my-model"
    shutil.copytree(TINY_FOLDER, folder)
    generation = {"eos_token_id": [1, 4], "pad_token_id": 0, "temperature": 0.7, "top_p": 0.8}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n# Mine\n")
    return folder


def test_stop_tokens_and_sampling_settings_of_the_base_are_kept(tmp_path: Path, local_base: Path) -> None:
    report = export_run(finished_run(tmp_path / "run", f"model.id={local_base}", PLAIN), prompts=4, problems=0)
    found = GenerationConfig.from_pretrained(report.folder)
    assert (found.eos_token_id, found.pad_token_id) == ([1, 4], 0)
    assert (found.temperature, found.top_p, found.do_sample) == (0.7, 0.8, True)


@pytest.mark.parametrize("what", ["merged", "adapter"])
def test_no_local_path_leaves_the_machine(tmp_path: Path, local_base: Path, what: str) -> None:
    overrides = (f"model.id={local_base}", f"output.dir={tmp_path}", "eval.problems=0", PLAIN)
    run = finished_run(tmp_path / "run", *overrides)
    report = export_run(run, what=what, prompts=4, problems=0)
    for name in report.files:
        assert str(tmp_path).encode() not in (report.folder / name).read_bytes(), name
    card = (report.folder / "README.md").read_text()
    data = ModelCard(card).data
    assert (data.license, data.license_name, data.license_link) == ("other", "mine", "LICENSE")
    assert data.base_model is None
    recipe = tomllib.loads(card.partition("```toml\n")[2].partition("```")[0])
    assert recipe["model"]["id"] == "my-model"
    assert recipe["output"]["dir"] == "runs"
    assert recipe["lora"] == run.recipe().to_dict()["lora"]
    if what == "adapter":
        config = json.loads((report.folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] is None
        assert 'from_pretrained("path/to/my-model"' in card


def test_the_chat_template_of_the_recipe_is_exported(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<|assistant|>"
    run = finished_run(tmp_path / "run", PLAIN, f'data.chat_template="{template}"', "data.system_prompt=Add.")
    report = export_run(run, prompts=4, problems=0)
    tokenizer = AutoTokenizer.from_pretrained(report.folder)
    assert tokenizer.chat_template == template
    assert "{'role': 'system', 'content': 'Add.'}" in (report.folder / "README.md").read_text()


def test_the_card_tells_what_the_run_came_to(tmp_path: Path) -> None:
    report = export_run(finished_run(tmp_path / "run", PLAIN), prompts=4, problems=0)
    card = ModelCard.load(report.folder / "README.md")
    assert card.data.base_model is None
    assert card.data.license is None
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert {"popo", "rlvr", "lora"} <= set(card.data.tags)
    assert "| pass@1 | 29.5% | 96.5% |" in card.text
    assert "| step by step | 30.0% | 30.0% |" in card.text
    assert "| mean tokens | 12.4 | 23.5 |" in card.text
    assert "| pass@1, 95% interval | 23.6% to 36.2% | 93.0% to 98.3% |" in card.text
    assert "pass@1 changed by +67.0 points, 95% interval +60.1 to +73.9, on 200 problems." in card.text
    assert "2605.06650" in card.text
    assert "@article{popo2026" in card.text
    assert tomllib.loads(card.text.partition("```toml\n")[2].partition("```")[0])["lora"]["rank"] == 16


def card_of(recipe: Recipe, **summary: object) -> str:
    return model_card(recipe, {**SUMMARY, **summary}, weights="policy", dtype=None, verification=None)


@pytest.mark.parametrize(
    ("algorithm", "title", "says"),
    [
        ("popo", "POPO", "Wrong answers are never trained on."),
        ("mixed", "POPO and a term against wrong answers", "A further term lowers the likelihood of wrong answers."),
        ("raft", "RAFT", "mean negative log-likelihood of the right ones"),
        ("grpo", "GRPO", "trains on all of them"),
    ],
)
def test_the_card_calls_the_algorithm_what_it_is(algorithm: str, title: str, says: str) -> None:
    card = card_of(load_recipe("tiny_cpu", (f"objective.algorithm={algorithm}",)))
    assert f"# tiny, trained with {title}\n" in card
    assert says in card
    assert ("Wrong answers are never" in card) == (algorithm == "popo")
    ours = algorithm in ("popo", "mixed")
    assert ("@article{popo2026" in card) == ("2605.06650" in card) == ("POPO" in card) == ours
    front = yaml.safe_load(card.split("---\n")[1])
    assert algorithm in front["tags"]
    assert ("popo" in front["tags"]) == ours
    data = ModelCard(card).data
    assert data == ModelCardData(**front)
    assert [result.metric_value for result in data.eval_results] == [0.965, 0.295]


def test_grpo_recipes_that_ship_are_not_called_popo() -> None:
    others = [recipe for recipe in map(load_recipe, shipped_recipes()) if recipe.objective.algorithm != "popo"]
    assert len(others) == 6
    for recipe in others:
        card = card_of(recipe)
        assert "trained with GRPO" in card
        assert "POPO" not in card


def test_the_card_names_no_path_server_or_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/planted-user")
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    planted = "/mnt/planted-disk/deep"
    recipe = load_recipe("tiny_cpu", [
        f"model.id={planted}/my-model", "lora.init_from=~/planted-folder/adapter",
        f"data.dataset={planted}/sums.jsonl",
        f'reward.functions=["math", {{name="json_schema", schema_file="{planted}/shape.json", weight=0.1}}]',
        "rollout.environment.name=game:Game", 'reward.positive_if=["math"]', "output.dir=~/planted-folder",
        f'rollout.environment.options={{data="{planted}/words.txt", api="https://planted-host/v1", size=3}}',
        'data.system_prompt="/no_think Read /home/planted-user/notes or hf_planted."', "eval.dataset=gsm8k",
        "eval.config=/home/planted-user/x",
    ])  # fmt: skip
    server = {"base_urls": ("http://me:secret@planted-host:1",), "shared_dir": planted}
    recipe = recipe.with_values({f"rollout.server.{key}": value for key, value in server.items()})
    changes = [
        {"step": 30, "key": "lora.init_from", "before": None, "now": f"{planted}/other"},
        {"step": 40, "key": "optimizer.learning_rate", "before": 2e-5, "now": 1e-5},
        {"step": 50, "key": "rollout.server.base_urls", "before": [], "now": ["http://planted-host"]},
        {"step": 60, "key": "rollout.environment.options", "before": {}, "now": {"data": f"{planted}/words.txt"}},
        {"step": 70, "key": "reward.functions", "before": None, "now": [{"schema_file": f"{planted}/other.json"}]},
    ]
    card = card_of(recipe, changes=changes, doubts=["steps 41 to 50 were not proved, /home/planted-user/run/log.txt"])
    assert "planted" not in card.replace("~/run/log.txt", "")
    assert "secret" not in card
    shown = tomllib.loads(card.partition("```toml\n")[2].partition("```")[0])
    assert shown["model"]["id"] == "my-model"
    assert shown["lora"]["init_from"] == "adapter"
    assert shown["data"]["dataset"] == "sums.jsonl"
    assert shown["data"]["system_prompt"] == "/no_think Read ~/notes or ***."
    assert shown["reward"]["functions"][1]["schema_file"] == "shape.json"
    assert shown["rollout"]["environment"].get("options", {}) == {}
    assert "base_urls" not in card or shown["rollout"]["server"]["base_urls"] == []
    assert '- from step 30 `lora.init_from` was "other", before unset\n' in card
    assert "- from step 40 `optimizer.learning_rate` was 1e-5, before 2e-5\n" in card
    assert "- steps 41 to 50 were not proved, ~/run/log.txt\n" in card


def test_settings_that_only_look_like_paths_are_shown_as_they_are() -> None:
    schema = {"$id": "/a/b", "properties": {"id": {"const": "/c/d"}, "dataset": {"const": "https://host/e"}}}
    recipe = load_recipe("tiny_cpu", [
        "data.dataset=gsm8k", 'data.filter={path = "/api/v1/users", id = "/x/y"}', "eval.dataset=https://host/private/set",
        "data.system_prompt=Answer as in https://host/style.",
        f"reward.functions=[{{name = 'math'}}, {{name = 'json_schema', weight = 0.1, schema = {to_toml(schema)}}}]",
        'reward.positive_if=["math"]',
    ])  # fmt: skip
    shown = tomllib.loads(card_of(recipe).partition("```toml\n")[2].partition("```")[0])
    expected = recipe.to_dict()
    assert shown["eval"].pop("dataset") == "set"
    del expected["eval"]["dataset"]
    for section in ("data", "eval", "reward"):
        assert shown[section] == expected[section]


@pytest.mark.parametrize("home", ["/root", "/home/me.x"])
def test_only_the_home_folder_itself_is_masked(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home)
    doubts = [f"{home}/run, file://{home}/x; https://host.co{home}/y; {home}less"]
    card = card_of(load_recipe("tiny_cpu", ["model.id=root/model"]), doubts=doubts)
    assert "https://huggingface.co/root/model" in card
    assert f"- ~/run, file://~/x; https://host.co{home}/y; {home}less\n" in card


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("models/acme/v2", "v2"), ("data/acme.txt", "acme.txt"), ("./acme/model", "model"), ("acme/folder/", "folder"),
        (r"C:\acme\model", "model"), ("https://acme.example/sets/one", "one"), ("~/acme/model", "model"),
        ("gone.gguf", "gone.gguf"), ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"), ("tiny", "tiny"),
    ],
)  # fmt: skip
def test_what_is_local_does_not_depend_on_the_working_folder(source: str, shown: str) -> None:
    assert known_as(source) == shown
    assert is_local(source) == (source not in ("tiny", "Qwen/Qwen2.5-0.5B"))


HOSTILE = '<img src=x onerror=alert(1)>`*x*`[a](http://b)\x1b[31m\u202e\n# Heading\n"); import os #'


def test_text_of_strangers_is_only_text_in_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's name and revision, doubts, changes and figures: no markup, and no other code in the example."""
    monkeypatch.chdir(tmp_path)
    name = HOSTILE.replace("/", ":")
    recipe = load_recipe("tiny_cpu").with_values({"model.revision": HOSTILE})
    changes = [{"step": 1, "key": key, "before": None, "now": HOSTILE} for key in (HOSTILE, "optimizer.schedule")]
    after = {**SUMMARY["after"], "task_figures": {HOSTILE: 0.5}}  # type: ignore[dict-item]
    for model in ("someone/model", f"{tmp_path}/{name}", f"someone/{name}"):
        card = card_of(recipe.with_values({"model.id": model}), doubts=[HOSTILE], changes=changes, after=after)
        code = card.partition("```python\n")[2].partition("```")[0]
        nodes = list(ast.walk(ast.parse(code)))
        assert HOSTILE in {node.value for node in nodes if isinstance(node, ast.Constant)}
        assert "os" not in {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        prose = "".join(re.split("```.*?```", card.split("---\n", 2)[2], flags=re.DOTALL))
        page = MarkdownIt("commonmark").enable("table").render(prose)
        assert "Heading" in page
        assert re.findall("<img|<em>|<a href=.http://b", page) == []
        assert page.count("<h1>") == 1
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", prose)
    assert "from step 1 `optimizer.schedule` was " in card
    assert "from step 1 `<img" not in card


def test_an_export_of_code_that_is_not_trusted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the function itself, not only by the command."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = finished_run(tmp_path / "run", PLAIN, "reward.functions=somebody:grade")
    for options in ({}, {"gguf": "f32"}):
        with pytest.raises(UserInputError, match="not trusted"):
            export_run(run, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    export_run(run, what="adapter", output=tmp_path / "out")  # needs no grading


def test_the_card_of_a_checkpoint_says_so() -> None:
    recipe = load_recipe("tiny_cpu")
    assert "after 60 steps of" in card_of(recipe)
    card = card_of(recipe, steps=20, after=None)
    assert "after 20 of 60 steps of" in card
    assert "| pass@1 | 29.5% |" in card
    assert "pass@1 changed" not in card
    assert ModelCard(card).data.eval_results is None


@pytest.mark.parametrize(
    ("options", "relation"),
    [
        ({"dtype": None}, "adapter"),
        ({"dtype": "float32"}, "finetune"),
        ({"dtype": "float32", "gguf": "bf16"}, "finetune"),
    ],
)
def test_the_card_says_what_the_hub_links(options: dict[str, Any], relation: str, tmp_path: Path) -> None:
    def data_of(*overrides: str) -> Any:
        recipe = load_recipe("gemma3_1b", overrides)
        return ModelCard(model_card(recipe, SUMMARY, weights="policy", verification=None, **options)).data

    data = data_of()
    assert (data.base_model, data.base_model_relation) == ("google/gemma-3-1b-it", relation)
    assert data.datasets == ["openai/gsm8k"]
    assert {result.dataset_type for result in data.eval_results} == {"openai/gsm8k"}
    local = data_of(f"data.dataset={tmp_path}/sums.jsonl", f"model.id={tmp_path}/base", "eval.dataset=")
    assert (local.base_model, getattr(local, "base_model_relation", None), local.datasets) == (None, None, None)


def test_the_licence_is_the_bases_own(tmp_path: Path) -> None:
    base = Path(shutil.copytree(TINY_FOLDER, tmp_path / "base"))
    named = "license: other\nlicense_name: mine\nlicense_link: https://example.org/licence\n"
    (base / "README.md").write_text(f"---\n{named}---\n# Base\n")
    card = card_of(load_recipe("tiny_cpu", [f"model.id={base}"]))
    assert all(line in card.splitlines() for line in named.splitlines())


@pytest.mark.parametrize("broken", ["license: [", "a: b: c", "- a\n- b", "license: {x: 1}", "\x00"])
def test_a_base_with_a_broken_card_is_exported_without_its_licence(tmp_path: Path, broken: str) -> None:
    base = Path(shutil.copytree(TINY_FOLDER, tmp_path / "base"))
    (base / "README.md").write_text(f"---\n{broken}\n---\n# Mine\n")
    card = model_card(
        load_recipe("tiny_cpu", [f"model.id={base}"]), SUMMARY, weights="policy", dtype=None, verification=None
    )
    assert ModelCard(card).data.license is None


def test_a_card_that_cannot_be_written_loses_no_export(
    tmp_path: Path, plain_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(folder, "model_card", fail)
    with pytest.raises(ExportError, match="its card could not be written: ZeroDivisionError: division by zero"):
        export_run(plain_run, what="adapter", output=tmp_path / "adapter")
    assert {"adapter_model.safetensors", "export.json", "README.md"} <= traces(tmp_path / "adapter")


# --------------------------------------------------------------------------------------------- refusals


def traces(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_options_that_cannot_be_met_are_refused_before_anything_is_loaded(
    nf4_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "load_trained_policy", lambda *_: pytest.fail("a model was loaded"))
    options: dict[str, Any]
    for options, message in (
        ({"dtype": "int8"}, 'there is no precision "int8"'),
        ({"base": "mine"}, 'there is no base "mine"'),
        ({"prompts": 0}, "prompts = 0, problems = None: is too small"),
        ({"what": "adapter", "dtype": "float16"}, "--dtype is for merged models"),
        ({"what": "adapter", "gguf": "q8_0"}, "--gguf is for merged models"),
        ({"what": "adapter", "base": "original"}, "--base original is for merged models"),
        ({"problems": 99999}, "--problems 99999: only .* problems of arithmetic are held out"),
    ):
        with pytest.raises(UserInputError) as caught:
            export_run(nf4_run, **options)
        assert re.search(message, str(caught.value)), caught.value
        assert "eval.problems" not in str(caught.value)
    assert not (nf4_run.path / "export").exists()


def test_the_library_takes_the_options_of_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(pipeline, "export_run", lambda _, **options: given.append(options))
    monkeypatch.setattr(subject, "evaluate_models", lambda _, **options: given.append(options))
    wanted = {"gguf": "q8_0", "dtype": "float32", "base": "original", "prompts": 2, "problems": 3}
    popo_lite.export("run", **wanted)  # type: ignore[arg-type]
    sampling = {"temperature": 0.5, "seed": 4, "engine": "hf", "problems": 3}
    popo_lite.evaluate("run", **sampling)  # type: ignore[arg-type]
    assert wanted.items() <= given[0].items()
    assert sampling.items() <= given[1].items()


@pytest.mark.parametrize("base", ["trained", "original"])
def test_a_wrong_merge_is_found_out(
    tmp_path: Path, nf4_run: RunFolder, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    def merge_leaving_one_layer_out(model: Any, dtype: str) -> Any:
        for name, parameter in model.named_parameters():
            if name.endswith("layers.1.self_attn.o_proj.lora_B.default.weight"):
                parameter.data.zero_()
        return merge(model, dtype)

    merge = pipeline.merge
    monkeypatch.setattr(pipeline, "merge", merge_leaving_one_layer_out)
    with pytest.raises(ExportError, match="the merged model is not the trained policy"):
        export_run(nf4_run, base=base, output=tmp_path / "model", prompts=8, problems=0)
    assert traces(tmp_path) == set()


def test_an_adapter_that_changes_between_the_two_loads_is_found_out(
    tmp_path: Path, plain_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_unmerged = pipeline.load_unmerged
    monkeypatch.setattr(
        pipeline, "load_unmerged", lambda recipe, model, _: load_unmerged(recipe, model, plain_run.siamese)
    )
    with pytest.raises(ExportError, match="the merged model is not the trained policy"):
        export_run(plain_run, output=tmp_path / "model", prompts=8, problems=0)


def test_other_stop_tokens_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished_run(tmp_path / "run", PLAIN)
    write = pipeline.write_model
    monkeypatch.setattr(pipeline, "write_model", lambda *arguments: write(*arguments[:3], frozenset({2})))
    with pytest.raises(ExportError, match=r"stops at the tokens \[2\], the trained policy at \[1\]"):
        export_run(run, prompts=4, problems=0)


def test_another_chat_template_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<|assistant|>"
    run = finished_run(tmp_path / "run", PLAIN, f'data.chat_template="{template}"')
    save = PreTrainedTokenizerBase.save_pretrained

    def save_with_another_template(tokenizer: Any, *arguments: Any, **options: Any) -> Any:
        tokenizer.chat_template = AutoTokenizer.from_pretrained(TINY_FOLDER).chat_template
        return save(tokenizer, *arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", save_with_another_template)
    with pytest.raises(ExportError, match="makes other tokens of a prompt"):
        export_run(run, prompts=4, problems=0)


def test_a_broken_adapter_is_not_worth_exporting(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", PLAIN)
    tensors = load_file(run.adapter / ADAPTER_FILE)
    first = sorted(tensors)[0]
    save_file({**tensors, first: tensors[first] * float("nan")}, run.adapter / ADAPTER_FILE)
    with pytest.raises(ExportError, match="not finite"):
        export_run(run, prompts=4, problems=0)
    assert not (run.path / "export").exists()


def test_a_base_stored_in_4_bits_is_dequantised(tmp_path: Path) -> None:
    base = tmp_path / "tiny-4bit"
    policy = load_policy(load_recipe("tiny_cpu"))
    policy.model.unload().save_pretrained(base)
    policy.tokenizer.save_pretrained(base)
    run = finished_run(tmp_path / "run", f"model.id={base}")
    report = export_run(run, prompts=4, problems=0)
    expected = expected_weights(run.adapter, dequantized_weights(torch.float32))
    assert largest_difference(weights_of(report.folder), expected) < 1e-6
    assert report.verification is not None
    assert "other_base" not in report.verification
    with pytest.raises(ExportError, match="has no original weights") as caught:
        export_run(run, base="original", output=tmp_path / "original", prompts=4, problems=0)
    assert "--base trained" in str(caught.value)
    assert ADAPTER_FILE in export_run(run, what="adapter").files


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", PLAIN)
    run.summary_path.unlink()
    with pytest.raises(CheckpointError, match="has no checkpoint yet") as caught:
        export_run(run)
    assert caught.value.next_step == f"popo-lite resume {run.path}"
    with pytest.raises(CheckpointError, match="there is no run here"):
        export_run(RunFolder(tmp_path / "nowhere"))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", PLAIN)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    with pytest.raises(UserInputError, match="not empty"):
        export_run(run, output=full)
    assert traces(full) == {"mine.txt"}
    with pytest.raises(UserInputError, match="not empty"):
        export_run(run, output=full / "mine.txt")
    with pytest.raises(ExportError, match="could not be written: Not a directory"):
        export_run(run, output=full / "mine.txt" / "deeper", prompts=4, problems=0)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "model.safetensors" in export_run(run, output=empty, prompts=4, problems=0).files
