"""`popo-lite serve`."""

from __future__ import annotations

import collections
import ipaddress
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from popo_lite.errors import EngineError, PopoError, UserInputError
from popo_lite.tools.checkpoint_option import checkpoint_option
from popo_lite.tools.completion import complete_run
from popo_lite.tools.serve_process import GRACE_SECONDS
from popo_lite.trust import MODEL_CODE, refuse_untrusted, trust_option

if TYPE_CHECKING:
    from popo_lite.tools.benchmarks.subject import Subject

QUESTION = "What is 3 + 4?"
SHOWN_LINES = 20
"""Last lines of a server that failed."""
BASE = "base"
"""Name of the base model beside a run's adapter."""
ALL_WEIGHTS = {"policy": "adapter", "siamese": "siamese"}
"""Name of a run's weights on the command line -> in `open_run`."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the trained policy thinks follows `token_ids`: the log-probs of its likeliest next tokens, in nats.

    `limit` is the largest mean difference that rounding explains.
    """

    token_ids: tuple[int, ...]
    logps: Mapping[int, float]
    limit: float


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
    import torch

    from popo_lite.policy.load import model_source
    from popo_lite.recipe import VLLMRecipe
    from popo_lite.tools.benchmarks.subject import open_model, open_run, task_run
    from popo_lite.tools.console.output import notify, progress

    _check_address(host, port, notify)
    path = Path(model).expanduser()
    is_run = (path / "recipe.toml").is_file()
    if is_run:
        subject = open_run(path, [ALL_WEIGHTS[weights or "policy"]], checkpoint)
        recipe = subject.recipe
    else:
        subject = open_model(model, [weights] if weights else (), checkpoint=checkpoint)
        recipe = subject.recipe
        if run := task_run([model], None):  # an export, in the folder of its run
            recipe = recipe.with_values({"data": run.recipe().data, "rollout": run.recipe().rollout})
            recipe = recipe.with_values({"rollout.vllm": VLLMRecipe()})
    refuse_untrusted(recipe, model, trust, only=MODEL_CODE)

    from popo_lite.samplers.vllm import why_not

    if reason := why_not(recipe):
        raise EngineError(reason, where=model, next_step=f"popo-lite chat {shlex.quote(model)} needs no vLLM")
    name = name or re.sub(r"[^\w.-]", "-", path.resolve().name)
    if is_run and name == BASE:
        raise UserInputError(f'"{BASE}" is the name of the base model', where="--name", next_step="choose another name")
    environment = {**_defaults(), **os.environ}
    with TemporaryDirectory(prefix="popo-lite-serve-") as made, _stopped_by_signals():
        folder = Path(made)
        options = _common_options(recipe, folder, max_model_len) | {"host": host, "port": port}
        probe = None
        if is_run:
            with progress("reading the run"):
                of_run, probe = _in_own_process(_prepare, subject, max_model_len, folder)
            options = of_run | options | {"served_model_name": BASE, "lora_modules": f"{name}={folder / 'adapter'}"}
        else:
            options |= {"model": model_source(recipe.model), "dtype": recipe.model.dtype, "served_model_name": name}
        if recipe.train.device != "cpu" and torch.cuda.is_available():
            options["gpu_memory_utilization"] = gpu_memory_utilization
        else:
            options["enforce_eager"] = True  # compiling takes longer than it saves
        key = os.environ.get("VLLM_API_KEY")
        url = _url(host, port)
        with _server(_flags(options), environment) as server:
            with progress(f"starting vLLM on {url}"):
                _wait(server, url)
                _try_out(server, url, name, key, probe)
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


def _defaults() -> dict[str, str]:
    from popo_lite.samplers.vllm import ENVIRONMENT

    return {name: value for name, value in ENVIRONMENT.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}


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
    (folder / "template.jinja").write_text(template, encoding="utf-8")
    return {
        "tokenizer": str(folder / "tokenizer"),
        "generation_config": str(folder),
        "chat_template": str(folder / "template.jinja"),
        "chat_template_content_format": "string",
        "max_model_len": length,
    }


def _prepare(subject: Subject, max_model_len: int | None, folder: Path) -> tuple[dict[str, Any], Probe]:
    """Write the adapter to `folder` and the dequantised base to the cache; return vLLM's options and a probe."""
    import torch

    from popo_lite.policy.adapters import save_adapter
    from popo_lite.samplers.probe import MAX_GAP_NATS
    from popo_lite.samplers.vllm import base_options
    from popo_lite.tasks.rendering import Renderer
    from popo_lite.types import Problem

    recipe = subject.recipe
    policy = subject.load(recipe)
    save_adapter(policy.model, folder / "adapter", base_id=recipe.model.id)
    renderer = Renderer(recipe, policy.tokenizer, stop_ids=policy.stop_ids)
    ids = renderer.token_ids(Problem(id="serve", messages=({"role": "user", "content": QUESTION},), answer=""))
    with torch.no_grad():
        hidden = policy.hidden_states(torch.tensor(ids, device=policy.device), [(len(ids),)])[-1:]
        logits = policy.head.logits(hidden) * policy.head.temperature
    likeliest = torch.log_softmax(logits.float()[0], dim=-1).topk(5)
    if max_model_len is not None:
        lengths = {"rollout.max_prompt_length": max_model_len - 1, "rollout.max_completion_length": 1}
        recipe = recipe.with_values(lengths)
    options = base_options(policy, recipe)
    options["enforce_eager"] = recipe.rollout.vllm.enforce_eager
    coarse = recipe.rollout.vllm.base == "bf16" or recipe.rollout.vllm.kv_cache_dtype == "fp8"
    dtype = torch.bfloat16 if coarse else policy.head.weight.dtype
    return options, Probe(
        token_ids=ids,
        logps=dict(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)),
        limit=recipe.rollout.max_gap or MAX_GAP_NATS[dtype],
    )


def _in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `work` returns in another process, whose memory, also of the GPU, is then free for the server."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError as error:
        process.join()
        what = f"the process that reads the run ended with exit code {process.exitcode}"
        next_step = (
            "free some memory and rerun the command" if process.exitcode == -9 else "please report what it printed"
        )
        raise EngineError(what, next_step=next_step) from error
    finally:
        process.kill()
        process.join()
    if isinstance(outcome, PopoError):
        raise outcome
    return outcome


def _send(sender: Any, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    try:
        sender.send(work(*arguments))
    except PopoError as error:
        sender.send(error)


def _flags(options: Mapping[str, Any]) -> list[str]:
    """Return `options` as vLLM's command line takes them."""
    words = []
    for key, value in options.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return words


class _Server:
    """A running server. Its lines are kept, and from then on given to `forward` if that is set."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.forward: Callable[[str], None] | None = None
        self._lines: collections.deque[str] = collections.deque(maxlen=SHOWN_LINES)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self._lines.append(line.rstrip())
            if self.forward is not None:
                self.forward(line.rstrip())

    def failure(self, what: str) -> EngineError:
        """Return the error that shows the server's last lines."""
        self._reader.join(1.0)
        last = "\n".join(line for line in self._lines if line.strip()) or "it printed nothing"
        next_step = "lower --gpu-memory-utilization or --max-model-len if memory ran out; else see docs/chat.md"
        return EngineError(f"{what}; its last lines:\n{last}", where="vLLM", next_step=next_step)


@contextmanager
def _server(flags: Sequence[str], environment: Mapping[str, str]) -> Iterator[_Server]:
    """Run the server for the block. However that ends, no process of it is left."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "popo_lite.tools.serve_process", str(os.getpid()), *flags],
        env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,  # Ctrl-C is for this process, which then ends the server in order
    )  # fmt: skip
    try:
        yield _Server(process)
    finally:
        try:
            process.terminate()
            process.wait(GRACE_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass  # it hangs, or a second Ctrl-C
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block like Ctrl-C, which is how a server is stopped."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(server: _Server, url: str) -> None:
    """Return once the server is healthy. Raises EngineError if it ends before."""
    import httpx

    while server.process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", trust_env=False, timeout=10).status_code == 200:
                return
        time.sleep(0.5)
    raise server.failure("the server did not start")


def _try_out(server: _Server, url: str, name: str, key: str | None, probe: Probe | None) -> None:
    """Ask for one answer. Raises EngineError if there is none, or not from the weights of `probe`."""
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}

    def ask(path: str, **body: Any) -> Any:
        try:
            reply = httpx.post(f"{url}/v1/{path}", json={"model": name, "max_tokens": 1, **body}, headers=headers,
                               trust_env=False, timeout=600)  # fmt: skip
            if reply.status_code == 200:
                return reply.json()["choices"][0]
            reason = f"status {reply.status_code}: {reply.text[:300]}"
        except httpx.TransportError as error:
            reason = type(error).__name__
        raise server.failure(f"the server does not answer ({reason})")

    ask("chat/completions", messages=[{"role": "user", "content": QUESTION}])
    if probe is None:
        return
    choice = ask(
        "completions", prompt=list(probe.token_ids), temperature=1, logprobs=5, return_tokens_as_token_ids=True
    )
    found = {int(k.removeprefix("token_id:")): v for k, v in choice["logprobs"]["top_logprobs"][0].items()}
    gaps = [abs(found[token] - logp) for token, logp in probe.logps.items() if token in found]
    gap = sum(gaps) / len(gaps) if gaps else math.inf
    if not gap <= probe.limit:
        what = f"the server does not answer with the trained weights: log-probs differ by {gap:.3g} nats"
        next_step = "popo-lite export RUN writes a merged model, which can be served; please report this"
        raise EngineError(what, where="vLLM", next_step=next_step)


def _url(host: str, port: int) -> str:
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # compared, not bound
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def _report(url: str, name: str, model: str, *, is_run: bool, as_json: bool) -> None:
    """Print how to ask the server and how to stop it."""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": QUESTION}]})
    # The key stays in the environment: a shell reads it there.
    key, login = ("", "") if not os.environ.get("VLLM_API_KEY") else (
        'os.environ["VLLM_API_KEY"]', ' -H "Authorization: Bearer $VLLM_API_KEY"'
    )  # fmt: skip
    curl = f"curl -s {url}/v1/chat/completions -H 'Content-Type: application/json'{login} -d {shlex.quote(body)}"
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
        *(["import os\n"] if key else []),
        "from openai import OpenAI",
        "",
        f'client = OpenAI(base_url="{url}/v1", api_key={key or json.dumps("none")})',
        f'messages = [{{"role": "user", "content": "{QUESTION}"}}]',
        f'print(client.chat.completions.create(model="{name}", messages=messages).choices[0].message.content)\n',
        "Ctrl-C stops the server.",
    ]
    write("\n".join(lines), sys.stdout)
    sys.stdout.flush()
