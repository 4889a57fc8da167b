"""One vLLM server over HTTP, through openai's client: requests, and failures after which another server can serve."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never
from urllib.parse import urlsplit

from popo_lite.errors import EngineError
from popo_lite.samplers.base import SamplingParams

ATTEMPTS = 4
"""Of every request, with growing waits between them."""
SHORT_SECONDS = 10.0
"""To connect, and for all that takes a healthy server no time."""
LOAD_SECONDS = 300.0
ANSWER_SECONDS = 3600.0
"""For one completion, including the wait for its turn."""
HEALTH_EVERY_SECONDS = 15.0

PROBE_TOKENS = (1, 2, 3, 4)
LEAST_LOGP = -9999.0
"""What vLLM writes for minus infinity."""

Reply = tuple[int, str]
"""Status and text of a response."""


class ServerFault(Exception):  # noqa: N818  # a finding about one server, on which the sampler decides
    """This server cannot be used now. `advice` is set if starting it again would not help."""

    def __init__(self, reason: str, *, advice: str | None = None) -> None:
        super().__init__(reason)
        self.advice = advice


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One completion: token ids with the end-of-sequence token, and their log-probs in nats."""

    token_ids: tuple[int, ...]
    logps: tuple[float, ...]


class ServerClient:
    """One server. `adapter` names the adapter that it answers with.

    Every method raises ServerFault if the server cannot be used, after retries if these may help.
    """

    def __init__(self, url: str, *, token: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.adapter: str | None = None
        self._held: list[str] = []
        try:
            import openai
        except ImportError as error:
            raise EngineError(
                "rollouts from servers need the openai package",
                where='rollout.engine = "server"',
                next_step="pip install 'popo-lite[server]'",
            ) from error
        try:
            urlsplit(url).port  # noqa: B018  # raises for a port that is not a number
            self._client = openai.AsyncOpenAI(
                base_url=self.url,
                api_key=token or "none",
                default_headers={"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()},  # type: ignore[dict-item]
                # No proxy or .netrc may see prompts and token, or replace the token.
                http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
            )
        except ValueError as error:
            raise EngineError(
                f"{url} is no URL: {error}",
                where="rollout.server.base_urls",
                next_step='for instance "http://127.0.0.1:8000"',
            ) from error

    async def connect(self, *, context_tokens: int) -> None:
        """Check that it is there, has room for `context_tokens`, and gives log-probs under the sampling temperature."""
        await self.check_health()
        models = _json(await self._ask("GET", "/v1/models"), "/v1/models")
        try:
            base = next(card for card in models["data"] if card.get("parent") is None)
            name, room = str(base["id"]), int(base["max_model_len"])
        except (LookupError, TypeError, ValueError, StopIteration) as error:
            raise ServerFault("its list of models is not one of a vLLM server") from error
        if room < context_tokens:
            raise ServerFault(
                f"its context is {room} tokens, and prompt and answer may take {context_tokens}: it was started with "
                "too small a --max-model-len"
            )
        # Under half the temperature the distance between two log-probs is double, unless they ignore it.
        usual, halved = [await self._top_logps(name, temperature) for temperature in (1.0, 0.5)]
        shared = usual.keys() & halved.keys()
        if len(shared) < 2:
            raise ServerFault("its answers lack the log-probs that were asked for")
        distance, doubled = (
            max(top[token] for token in shared) - min(top[token] for token in shared) for top in (usual, halved)
        )
        if doubled < 1.5 * distance:
            raise ServerFault(
                "its log-probs ignore the sampling temperature: it was started without "
                "--logprobs-mode processed_logprobs"
            )

    async def check_health(self, attempts: int = ATTEMPTS) -> None:
        """Ask GET /health."""
        status, _ = await self._ask("GET", "/health", attempts=attempts)
        if status != 200:
            raise ServerFault(f"it answers {status} to GET /health, which is not what a vLLM server does")

    async def watch(self) -> Never:
        """Check its health now and then until it fails: a host that is gone leaves requests without an answer."""
        while True:
            await asyncio.sleep(HEALTH_EVERY_SECONDS)
            await self.check_health()

    async def load(self, name: str, folder: Path) -> None:
        """Make the adapter in `folder` the only one of ours on the server, under `name`, which must be new."""
        path = "/v1/load_lora_adapter"
        try:
            reply = await self._ask("POST", path, {"lora_name": name, "lora_path": str(folder)}, seconds=LOAD_SECONDS)
        except ServerFault as fault:
            # 500 can mean an adapter that it cannot hold; a dying server does not pass the health check.
            await self.check_health(attempts=1)
            raise ServerFault(f"it does not take the adapter: {fault}", advice=fault.advice) from fault
        # If the first attempt succeeded unheard, the retry finds the name taken.
        if reply[0] != 200 and "already been loaded" not in reply[1]:
            raise _load_fault(reply, folder)
        former, self._held, self.adapter = self._held, [*self._held, name], name
        for one in former:
            await self._unload(one)

    async def release(self) -> None:
        """Unload every adapter that it has from us."""
        self.adapter = None
        for name in list(self._held):
            await self._unload(name, attempts=1)

    async def complete(
        self, prompt: Sequence[int], *, params: SamplingParams, seed: int, stop_ids: frozenset[int]
    ) -> Answer:
        """Return a completion of `prompt` by the adapter. Raises EngineError if its log-probs are not finite."""
        limit = params.max_completion_length
        reply = await self._ask(
            "POST",
            "/v1/completions",
            {
                **_drawing(prompt, temperature=params.temperature, tokens=limit),
                "top_p": params.top_p,
                "model": self.adapter,
                "seed": seed,
                "logprobs": 0,  # the sampled token's own
                "stop_token_ids": sorted(stop_ids),
            },
            seconds=ANSWER_SECONDS,
        )
        if reply[0] == 404:
            raise ServerFault(f"it lost its adapter, as a server does that was restarted: {_message(reply)}")
        if "not JSON compliant" in reply[1]:
            raise self._not_finite()
        choice = _choice(reply)
        if choice.get("finish_reason") not in ("stop", "length"):
            raise ServerFault(f'it broke off an answer ("{choice.get("finish_reason")}")')
        answer = _answer(choice)
        if not all(math.isfinite(logp) and logp > LEAST_LOGP for logp in answer.logps):
            raise self._not_finite()
        stops = [token in stop_ids for token in answer.token_ids]
        if any(stops[:-1]) or not (stops[-1] or len(stops) == limit) or len(stops) > limit:
            raise ServerFault(
                f"an answer of {len(stops)} tokens ends with token {answer.token_ids[-1]}, and answers end with one of "
                f"{sorted(stop_ids)} or at {limit} tokens: the server has another idea of where they end"
            )
        return answer

    async def aclose(self) -> None:
        """Close its connections."""
        await self._client.close()

    async def _unload(self, name: str, attempts: int = ATTEMPTS) -> None:
        reply = await self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name}, attempts=attempts)
        if reply[0] not in (200, 404):  # 404: it was restarted and does not know the adapter
            raise ServerFault(f"it does not drop an adapter: {_message(reply)}")
        self._held.remove(name)

    async def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        seconds: float = SHORT_SECONDS,
        attempts: int = ATTEMPTS,
    ) -> Reply:
        """Return the reply once there is one, of a status that says something about the request."""
        import openai

        client = self._client.with_options(
            max_retries=attempts - 1, timeout=openai.Timeout(SHORT_SECONDS, read=seconds)
        )
        try:
            if method == "GET":
                return 200, await client.get(path, cast_to=str)
            return 200, await client.post(path, cast_to=str, body=body)
        except openai.APITimeoutError as error:
            raise ServerFault(f"no answer to {method} {path}") from error
        except openai.APIConnectionError as error:
            raise ServerFault(f"no connection ({error.__cause__ or error})") from error
        except openai.APIStatusError as error:
            reply = error.status_code, error.response.text
            if reply[0] in (401, 403):
                raise ServerFault(
                    f"it refuses the token with {reply[0]}",
                    advice="set POPO_SERVER_TOKEN to the key that the server was started with",
                ) from error
            if reply[0] in (408, 409, 429) or reply[0] >= 500:  # what the client retries
                raise ServerFault(f"it answers {reply[0]} to {method} {path}: {_message(reply)}") from error
            return reply

    async def _top_logps(self, model: str, temperature: float) -> dict[str, float]:
        """Return log-probs of the likeliest first tokens after a few arbitrary ones, by the base."""
        body = {**_drawing(PROBE_TOKENS, temperature=temperature, tokens=1), "model": model, "seed": 0, "logprobs": 5}
        choice = _choice(await self._ask("POST", "/v1/completions", body))
        _answer(choice)
        try:
            return {str(token): float(logp) for token, logp in choice["logprobs"]["top_logprobs"][0].items()}
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ServerFault("its answers lack the log-probs that were asked for") from error

    def _not_finite(self) -> EngineError:
        return EngineError(
            "the model's log-probs are not finite, so its weights or activations are not either",
            where=self.url,
            next_step="restart the servers, whose caches keep it, and go back to an earlier checkpoint with a lower "
            "optimizer.learning_rate",
        )


def _json(reply: Reply, path: str) -> Any:
    try:
        return json.loads(reply[1])
    except ValueError as error:
        raise ServerFault(f"its answer to {path} is not JSON ({reply[1][:60]!r})") from error


def _choice(reply: Reply) -> dict[str, Any]:
    if reply[0] != 200:
        raise ServerFault(f"it refuses a request: {_message(reply)}")
    content = _json(reply, "/v1/completions")
    try:
        return dict(content["choices"][0])
    except (LookupError, TypeError, ValueError) as error:
        raise ServerFault("its answer to /v1/completions holds no completion") from error


def _answer(choice: dict[str, Any]) -> Answer:
    try:
        ids = tuple(int(token) for token in choice["token_ids"])
        logps = tuple(float(logp) for logp in choice["logprobs"]["token_logprobs"])
    except (LookupError, TypeError, ValueError) as error:
        raise ServerFault("its answers lack token ids or log-probs, which vLLM 0.32 gives on request") from error
    if not ids or len(ids) != len(logps):
        raise ServerFault(f"an answer of {len(ids)} tokens came with {len(logps)} log-probs")
    return Answer(token_ids=ids, logps=logps)


def _load_fault(reply: Reply, folder: Path) -> ServerFault:
    message = _message(reply)
    if "No adapter found" in message:
        return ServerFault(
            f"it finds no adapter at {folder}",
            advice="rollout.server.shared_dir must be one folder under one path for trainer and servers, and readable",
        )
    if reply[0] == 404:
        return ServerFault(
            "it takes no adapters: it was started without --enable-lora or VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        )
    return ServerFault(f"it does not take the adapter: {message}")


def _drawing(prompt: Sequence[int], *, temperature: float, tokens: int) -> dict[str, Any]:
    """Return a request's body without model and seed. Every change to the distribution is off by name.

    vLLM would take missing settings from the model's generation_config.json.
    """
    return {
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # else tokens with equal text share an entry
    }


def _message(reply: Reply) -> str:
    """Return the server's own words if it has some, else the start of what it sent."""
    try:
        return str(json.loads(reply[1])["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return reply[1][:200] or f"status {reply[0]}"
