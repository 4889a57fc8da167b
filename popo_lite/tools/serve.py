"""`popo-lite serve`."""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import re
import shlex
import socket
import string
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from popo_lite.errors import EngineError, UserInputError
from popo_lite.tools.checkpoint_option import checkpoint_option
from popo_lite.tools.completion import complete_run
from popo_lite.tools.serve_process import MIDDLEWARE, Server, in_own_process, running_server, stopped_by_signals
from popo_lite.trust import MODEL_CODE, refuse_untrusted, trust_option

if TYPE_CHECKING:
    from popo_lite.tools.benchmarks.subject import Subject

QUESTION = "What is 3 + 4?"
BASE = "base"
"""Name of the base model beside a run's adapter."""
NAME = re.compile(r"[\w.][\w.-]*", re.ASCII)
PROBE_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The log-probs, in nats, of the last of `token_ids` by the weights that are served and by their base.

    `base` is None for a model without an adapter. `limit` is the largest mean difference that rounding explains.
    """

    token_ids: tuple[int, ...]
    served: tuple[float, ...]
    base: tuple[float, ...] | None
    limit: float

    def refusal(self, served: Sequence[float], base: Sequence[float]) -> str | None:
        """Return why a server that answers with these log-probs has other weights, or None."""
        if not (gap := _gap(served, self.served)) <= self.limit:  # NaN must fail, too
            return f"log-probs differ by {gap:.3g} nats on average, and {self.limit:.3g} is the most that rounding does"
        if self.base is None:
            return None
        # How far the two bases differ is rounding, or the recipe's own choice of another base.
        rounding, effect = _gap(base, self.base), _gap(self.base, self.served)
        if effect > 4 * rounding and not gap < effect / 2:
            return f"log-probs differ by {gap:.3g} nats on average, and those of the base by {effect:.3g}"
        return None


def _gap(first: Sequence[float], second: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(first, second, strict=True)) / len(second)


@click.command(context_settings={"show_default": True})
@click.argument("model", shell_complete=complete_run, metavar="RUN_OR_FOLDER")
@click.option("--weights", type=click.Choice(["policy", "siamese"]), help="Weights of a run.  [default: policy]")
@checkpoint_option
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 lets other machines in.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000)
@click.option("--name", help="Name of the model for clients; default that of the folder.")
@click.option(
    "--max-model-len", type=click.IntRange(min=2), help="Most tokens of prompt and answer; default as in training."
)
@click.option(
    "--gpu-memory-utilization", type=click.FloatRange(0, 1, min_open=True), default=0.85, help="Share for vLLM."
)
@trust_option
@click.option("as_json", "--json", is_flag=True, help="Print one JSON object once the server answers.")
def serve(
    model: str, weights: str | None, checkpoint: int | str | None, host: str, port: int, name: str | None,
    max_model_len: int | None, gpu_memory_utilization: float, trust: bool, as_json: bool,
) -> None:  # fmt: skip
    """Serve RUN_OR_FOLDER, a run or a merged export, by vLLM with OpenAI's API until Ctrl-C.

    A run's adapter is served over the base that it was trained on, which is served beside it as `base`. If the
    environment variable VLLM_API_KEY is set, clients must send it.

    \b
    Example:
      popo-lite serve runs/tiny_cpu-seed0
    """
    from popo_lite.tools.chat.model import open_subject
    from popo_lite.tools.console.output import notify, progress

    _check_address(host, port, notify)
    folder_name = re.sub(r"[^\w.-]", "-", Path(model).expanduser().resolve().name, flags=re.ASCII).lstrip("-")
    name = name or folder_name or "model"
    if not NAME.fullmatch(name):
        what = f"{name!r} is not a name for a model: letters, digits, _, . and - are allowed"
        raise UserInputError(what, where="--name", next_step="choose another name")
    subject = open_subject(model, weights, checkpoint)
    recipe, is_run = subject.recipe, any(subject.adapters.values())
    refuse_untrusted(recipe, model, trust, only=MODEL_CODE)

    from popo_lite.samplers.vllm import ENVIRONMENT, command_line, why_not

    if reason := why_not(recipe):
        raise EngineError(reason, where=model, next_step=f"popo-lite chat {shlex.quote(model)} needs no vLLM")
    if is_run and name == BASE:
        raise UserInputError(f'"{BASE}" is the name of the base model', where="--name", next_step="choose another name")
    defaults = {name: value for name, value in ENVIRONMENT.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment = {**defaults, **os.environ}
    with TemporaryDirectory(prefix="popo-lite-serve-") as made, stopped_by_signals():
        folder = Path(made)
        options = _common_options(recipe, folder, max_model_len)
        with progress(f"reading {subject.name}"):
            of_model, probe = in_own_process(
                _prepare, subject, options["max_model_len"], gpu_memory_utilization, folder
            )
        options = of_model | options | {"host": host, "port": port, "middleware": MIDDLEWARE}
        if is_run:
            module = json.dumps({"name": name, "path": str(folder / "adapter")})
            options |= {"served_model_name": BASE, "lora_modules": module}
        else:
            options["served_model_name"] = name
        url = _url(host, port)
        with running_server(command_line(options), environment) as server:
            with progress(f"starting vLLM on {url}"):
                server.wait(url)
                _try_out(server, url, name, probe)
            _report(url, name, model, is_run=is_run, as_json=as_json)
            server.forward = notify
            try:
                server.process.wait()
            except KeyboardInterrupt:
                server.forward = None  # its last lines are those of libraries
                notify("stopping the server")
                return
            raise server.failure("the server ended")


def _check_address(host: str, port: int, notify: Callable[[str], None]) -> None:
    """Raise UserInputError if the port cannot be used; warn if others can use the server without a key."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        what, where = f"cannot listen there: {error.strerror or error}", f"--host {host} --port {port}"
        next_step = "--host 127.0.0.1"
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            with socket.create_server(("127.0.0.1", 0)) as free:
                next_step = f"--port {free.getsockname()[1]} is free"
        raise UserInputError(what, where=where, next_step=next_step) from error
    with suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    if host != "localhost" and not os.environ.get("VLLM_API_KEY"):
        notify(
            f"everyone who reaches port {port} of this machine can use the model; to require a key: Ctrl-C, "
            "export VLLM_API_KEY=$(openssl rand -hex 24), and the same command again"
        )


def _common_options(recipe: Any, folder: Path, max_model_len: int | None) -> dict[str, Any]:
    """Write what makes answers those of training to `folder`: stop ids, temperature, chat template, system prompt.

    Raises ModelError if the tokenizer cannot be used.
    """
    from types import SimpleNamespace

    from popo_lite.policy.load import load_config, load_generation_config, load_tokenizer
    from popo_lite.policy.parts import context_of
    from popo_lite.policy.tokens import open_renderer, stop_ids_of

    open_renderer(recipe)
    tokenizer, config = load_tokenizer(recipe.model), load_config(recipe.model)
    length = max_model_len or min(recipe.rollout.sequence_tokens, context_of(config))
    if length > context_of(config):
        what = f"the model's context is {context_of(config):,} tokens"
        raise UserInputError(what, where=f"--max-model-len {length}", next_step=f"--max-model-len {context_of(config)}")
    base = SimpleNamespace(config=config, generation_config=load_generation_config(recipe.model))
    stops = stop_ids_of(base, tokenizer, recipe.data.chat_template)
    generation = {"eos_token_id": sorted(stops), "temperature": recipe.rollout.temperature}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    template = recipe.data.chat_template or tokenizer.chat_template
    if recipe.data.system_prompt is not None:
        # For clients that send none, which is most of them.
        system = json.dumps({"role": "system", "content": recipe.data.system_prompt}, ensure_ascii=False)
        missing = "{% if messages[0].role != 'system' %}"
        template = f"{missing}{{% set messages = [{system}] + messages %}}{{% endif %}}{template}"
    if (day := recipe.data.date) and "strftime_now" in template:
        # The date of training, as in its prompts, and not the server's. Jinja cannot format dates, but replace text.
        directives = [f"%{flag}{letter}" for letter in string.ascii_letters for flag in ("", "-")]
        texts = json.dumps({directive: day.strftime(directive) for directive in directives})
        template = (
            "{%- macro strftime_now(format) -%}{%- set text = namespace(now=format) -%}"
            f"{{%- for directive, value in {texts}.items() -%}}"
            "{%- set text.now = text.now.replace(directive, value) -%}{%- endfor -%}{{ text.now }}{%- endmacro -%}"
        ) + template
    (folder / "template.jinja").write_text(template, encoding="utf-8")
    return {
        "tokenizer": str(folder / "tokenizer"),
        "generation_config": str(folder),
        "chat_template": str(folder / "template.jinja"),
        "chat_template_content_format": "string",
        "max_model_len": length,
    }


def _prepare(
    subject: Subject, length: int, gpu_memory_utilization: float, folder: Path
) -> tuple[dict[str, Any], Probe]:
    """Write the adapter to `folder` and the dequantised base to the cache; return vLLM's options and a probe."""
    import torch

    from popo_lite.policy.adapters import save_adapter
    from popo_lite.policy.load import model_source
    from popo_lite.samplers import SamplingParams
    from popo_lite.samplers.hf import HFSampler
    from popo_lite.samplers.probe import MAX_GAP_NATS
    from popo_lite.samplers.vllm import base_options
    from popo_lite.tasks.rendering import Renderer
    from popo_lite.types import Problem

    recipe = subject.recipe
    policy, adapter = subject.load(recipe), any(subject.adapters.values())
    vllm, dtype = recipe.rollout.vllm, policy.head.weight.dtype
    renderer = Renderer(recipe, policy.tokenizer, stop_ids=policy.stop_ids)
    prompt = renderer.render(Problem(id="serve", messages=({"role": "user", "content": QUESTION},), answer=""))
    params = SamplingParams(temperature=recipe.rollout.temperature, max_completion_length=PROBE_TOKENS)
    sampler = HFSampler(policy, recipe, text=renderer.text)
    [[answer]] = sampler.sample([prompt], count=1, params=params, policy_version=policy.version, stream=("serve", 0))
    ids = (*prompt.token_ids, *answer.token_ids)[: length - 1]  # vLLM adds one

    @torch.no_grad()
    def logps() -> tuple[float, ...]:
        hidden = policy.hidden_states(torch.tensor(ids, device=policy.device), [(len(ids),)])[:-1]
        logits = policy.head.logits(hidden[-PROBE_TOKENS:]).float() * policy.head.temperature
        targets = torch.tensor(ids[1:][-PROBE_TOKENS:], device=policy.device)
        return tuple(torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0].tolist())

    served, base = logps(), None
    options: dict[str, Any] = {"model": model_source(recipe.model), "dtype": recipe.model.dtype}
    if adapter:
        save_adapter(policy.model, folder / "adapter", base_id=recipe.model.id)
        with policy.model.disable_adapter():
            base = logps()
        lengths = {"rollout.max_prompt_length": length - 1, "rollout.max_completion_length": 1}
        options = base_options(policy, recipe.with_values(lengths)) | {"enforce_eager": vllm.enforce_eager}
        if vllm.base == "bf16" or vllm.kv_cache_dtype == "fp8":
            dtype = torch.bfloat16
    if policy.device.type == "cuda":
        options["gpu_memory_utilization"] = gpu_memory_utilization
    else:
        options["enforce_eager"] = True  # compiling takes longer than it saves
    limit = recipe.rollout.max_gap or MAX_GAP_NATS[dtype]
    return options, Probe(token_ids=ids, served=served, base=base, limit=limit)


def _try_out(server: Server, url: str, name: str, probe: Probe) -> None:
    """Ask for one answer. Raises EngineError if there is none, or not from the weights of `probe`."""
    import httpx

    key = os.environ.get("VLLM_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}

    def ask(path: str, **body: Any) -> Any:
        try:
            reply = httpx.post(f"{url}/v1/{path}", json={"max_tokens": 1, **body}, headers=headers, trust_env=False,
                               timeout=600)  # fmt: skip
            if reply.status_code == 200:
                return reply.json()["choices"][0]
            reason = f"status {reply.status_code}: {reply.text[:300]}"
        except httpx.TransportError as error:
            reason = type(error).__name__
        raise server.failure(f"the server does not answer ({reason})")

    def logps(model: str) -> list[float]:
        ids = probe.token_ids
        choice = ask("completions", model=model, prompt=list(ids), prompt_logprobs=0)
        found = [
            each[str(token)]["logprob"] for token, each in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True)
        ]
        return found[-PROBE_TOKENS:]

    ask("chat/completions", model=name, messages=[{"role": "user", "content": QUESTION}])
    if refusal := probe.refusal(logps(name), [] if probe.base is None else logps(BASE)):
        next_step = "please report this; popo-lite chat needs no vLLM, and popo-lite export RUN writes a merged model"
        raise EngineError(f"the server answers with other weights: {refusal}", where="vLLM", next_step=next_step)


def _url(host: str, port: int) -> str:
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # compared, not bound
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def _report(url: str, name: str, model: str, *, is_run: bool, as_json: bool) -> None:
    """Print how to ask the server and how to stop it."""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": QUESTION}]})
    key, login, header = json.dumps("none"), "", ""
    if os.environ.get("VLLM_API_KEY"):
        # The key stays in the environment, and off command lines, which other users can read: printf is a shell's own.
        key, login, header = (
            'os.environ["VLLM_API_KEY"]', "printf 'Authorization: Bearer %s' \"$VLLM_API_KEY\" | ", " -H @-",
        )  # fmt: skip
    curl = (
        f"{login}curl -s {url}/v1/chat/completions -H 'Content-Type: application/json'{header} -d {shlex.quote(body)}"
    )
    if as_json:
        content = {"url": f"{url}/v1", "model": name, "base": BASE if is_run else None, "curl": curl}
        click.echo(json.dumps(content))
        sys.stdout.flush()
        return
    from popo_lite.tools.console.output import write

    beside = f", and its base as {BASE}" if is_run else ""
    lines = [
        f"Serving {model} as {name}{beside}. Ask it:\n",
        f"{curl}\n",
        *(["import os\n"] if login else []),
        "from openai import OpenAI",
        "",
        f'client = OpenAI(base_url="{url}/v1", api_key={key})',
        f'messages = [{{"role": "user", "content": "{QUESTION}"}}]',
        f'print(client.chat.completions.create(model="{name}", messages=messages).choices[0].message.content)\n',
        "Ctrl-C stops the server.",
    ]
    write("\n".join(lines), sys.stdout)
    sys.stdout.flush()
