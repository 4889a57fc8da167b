"""Files of strangers that name or hold code: models, adapters, templates, datasets, schemas. Nothing of it runs."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from popo_lite.errors import ModelError, PopoError, RecipeError
from popo_lite.grading.functions import load_functions
from popo_lite.policy.load import TINY_FOLDER, load_config, load_tokenizer
from popo_lite.policy.policy import load_policy, load_trained_policy
from popo_lite.policy.tokens import open_renderer
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import new_run
from popo_lite.tasks import open_tasks, rendering
from popo_lite.types import Problem
from runs import finished_run

PROBLEM = Problem(id="1", messages=({"role": "user", "content": "What is 1 + 1?"},), answer="2")


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path):
    """A path that no test may bring into being; checks that the bomb is one."""
    yield tmp_path / "mark"
    assert not (tmp_path / "mark").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))  # noqa: S301
    assert (tmp_path / "mark").exists()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY_FOLDER, tmp_path / "model"))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def code(folder: Path, mark: Path, name: str) -> None:
    (folder / f"{name}.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Own: pass\n")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "training_args.bin"])
def test_pickled_weights_of_a_model_are_not_read(name: str, model: Path, mark: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb(mark)}, model / name)
    with pytest.raises(ModelError):
        load_policy(load_recipe("tiny_cpu", [f"model.id={model}"]))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_pickled_weights_of_an_adapter_are_not_read(name: str, tmp_path: Path, mark: Path) -> None:
    run = finished_run(tmp_path / "run")
    (run.adapter / "adapter_model.safetensors").unlink()
    torch.save({"weight": Bomb(mark)}, run.adapter / name)
    with pytest.raises(ModelError):
        load_trained_policy(run.recipe(), run.adapter)


def test_code_of_a_model_is_not_imported(model: Path, mark: Path) -> None:
    for name in ("configuration_own", "tokenization_own", "modeling_own", "custom_generate/generate"):
        (model / name).parent.mkdir(exist_ok=True)
        code(model, mark, name)
    auto = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    edit(model / "config.json", auto_map=auto)
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_own.Own"]})
    recipe = load_recipe("tiny_cpu", [f"model.id={model}"])
    load_policy(recipe)  # transformers has classes of its own for it
    edit(model / "config.json", model_type="own")
    with pytest.raises(ModelError, match="model.trust_remote_code"):
        load_config(recipe.model)
    with suppress(ModelError):  # its files may do without the code
        load_tokenizer(recipe.model)


@pytest.mark.parametrize("file", ["config", "tokenizer_config"])
def test_trusted_code_of_a_model_is_not_that_of_another(file: str, model: Path, tmp_path: Path, mark: Path) -> None:
    (tmp_path / "other").mkdir()
    code(tmp_path / "other", mark, "own")
    kind = "AutoConfig" if file == "config" else "AutoTokenizer"
    name = f"{tmp_path / 'other'}--own.Own"
    edit(model / f"{file}.json", auto_map={kind: name if file == "config" else [None, name]})
    recipe = load_recipe("tiny_cpu", [f"model.id={model}", "model.trust_remote_code=true"])
    with pytest.raises(ModelError, match="names Python code of another one") as caught:
        load_config(recipe.model) if file == "config" else load_tokenizer(recipe.model)
    assert caught.value.where == "model.trust_remote_code"


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x",
         "num_virtual_tokens": 1, "tokenizer_kwargs": {"trust_remote_code": True}},
        {"peft_type": "XLORA", "adapters": {"0": "someone/adapter"}},
        {"peft_type": None},
    ],
)  # fmt: skip
def test_an_adapter_that_is_no_lora_is_refused(config: dict[str, object], tmp_path: Path, mark: Path) -> None:
    run = finished_run(tmp_path / "run")
    code(tmp_path, mark, "tokenization_own")
    edit(run.adapter / "adapter_config.json", tokenizer_name_or_path=str(tmp_path), **config)
    with pytest.raises(ModelError, match="is of the kind"):
        load_trained_policy(run.recipe(), run.adapter)


ESCAPES = [
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ strftime_now.__self__.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{% include 'MARK' %}",
    "{{ messages.append(1) }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_cannot_leave_its_sandbox(template: str, mark: Path) -> None:
    template = template.replace("MARK", str(mark)) + "{{ messages[0].content }}"
    recipe = load_recipe("tiny_cpu", [f"data.chat_template={json.dumps(template)}"])
    try:
        text = open_renderer(recipe).tokenizer.decode(open_renderer(recipe).token_ids(PROBLEM))
    except ModelError:
        return
    assert "class" not in text.replace("__class__", "")
    assert "<" not in text


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(10 ** 9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[7].content.x }}",
        "{{ 9 ** (9 ** 8) }}",
        "{% if 9 ** (9 ** 8) %}{{ 8 ** (9 ** 8) }}{% endif %}",
    ],
)
@pytest.mark.parametrize("origin", ["recipe", "model"])
def test_a_chat_template_that_fails_or_never_ends_is_an_error(template, origin, model, monkeypatch) -> None:
    monkeypatch.setattr(rendering, "TEMPLATE_SECONDS", 0.2)
    template += "{{ messages[0].content }}"
    (model / "chat_template.jinja").write_text(template)
    setting = f"model.id={model}" if origin == "model" else f"data.chat_template={json.dumps(template)}"
    start = time.perf_counter()
    with pytest.raises(ModelError, match="chat template"):
        open_renderer(load_recipe("tiny_cpu", [setting])).token_ids(PROBLEM)
    assert time.perf_counter() - start < 10


@pytest.fixture
def asked():
    """(URL, list of the paths that were asked for) of a server on this machine."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()


@pytest.mark.parametrize("key", ["$ref", "$dynamicRef", "$recursiveRef", "$schema", "$id"])
@pytest.mark.parametrize("in_file", [True, False])
def test_a_schema_is_not_fetched(key: str, in_file: bool, asked, tmp_path: Path) -> None:
    url, paths = asked
    schema = {"type": "object", "properties": {"a": {key: f"{url}/remote.json"}}, key: f"{url}/remote.json"}
    (tmp_path / "shape.json").write_text(json.dumps(schema))
    table = f'schema_file="{tmp_path / "shape.json"}"' if in_file else f"schema={json_to_toml(schema)}"
    recipe = load_recipe("tiny_cpu", [f'reward.functions=[{{name="json_schema", {table}}}]'])
    with suppress(Exception):  # refused at once, or an outcome of the grader
        [function] = load_functions(recipe.reward, thinking_open=False)
        function.grade('{"a": {"b": 1}}', {"answer": "{}", "thinking_open": False})
    assert paths == []


def json_to_toml(value: dict[str, object]) -> str:
    pairs = (f"{json.dumps(k)} = {json_to_toml(v) if isinstance(v, dict) else json.dumps(v)}" for k, v in value.items())
    return f"{{{', '.join(pairs)}}}"


@pytest.mark.parametrize("name", ["own.py", "data.pkl", "data.pt", "dataset_infos.json"])
@pytest.mark.parametrize("folder", ["own", "pandas"])  # the latter is a reader of pickles in the library
def test_code_and_pickles_of_a_dataset_are_not_run(folder, name, tmp_path, mark, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / folder).mkdir()
    for place in (tmp_path, tmp_path / folder):
        if name.endswith(".py"):
            code(place, mark, "own")
        else:
            (place / name).write_bytes(pickle.dumps(Bomb(mark)))
    for dataset in (folder, f"{folder}/{name}", f"./{folder}"):
        options = [f"data.dataset={dataset}", "data.prompt_column=a", "data.answer_column=b", "data.split=train"]
        with pytest.raises(PopoError):
            open_tasks(load_recipe("tiny_cpu", options))


def test_a_folder_for_runs_loses_no_file(tmp_path: Path) -> None:
    """`output.dir` may be any folder of the user's, and a run that writes nothing is removed again."""
    mine = tmp_path / "tiny-seed0" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with new_run(load_recipe("tiny_cpu", [f"output.dir={tmp_path}", "train.seed=0"]), "tiny", None) as run:
        assert run.path == tmp_path / "tiny-seed0-2"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "mine"


def test_the_verifiers_of_reasoning_gym_run_on_its_own_problems_alone(tmp_path: Path) -> None:
    """Some call `eval` on the problem's entry, which a dataset of a stranger would supply."""
    (tmp_path / "rows.jsonl").touch()
    gym = "reasoning-gym:number_sorting"
    load_recipe("tiny_cpu", [f"data.dataset={gym}", f"eval.dataset={gym}"])
    file = f"={tmp_path / 'rows.jsonl'}"
    penalty = 'reward.functions=["math", {name="reasoning_gym", weight=0.0}]'
    for options in (
        ["reward.functions=reasoning_gym"],
        ["reward.functions=reasoning_gym", f"data.dataset{file}"],
        [penalty, f"data.dataset{file}"],
        [f"data.dataset={gym}", f"eval.dataset{file}"],
    ):
        with pytest.raises(RecipeError, match="is for problems of reasoning-gym alone"):
            load_recipe("tiny_cpu", options)
