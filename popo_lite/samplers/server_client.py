"""One vLLM server over HTTP: what is asked of it, and which of its failures mean that another may be asked."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from random import SystemRandom
from typing import Any, Never

import httpx

from popo_lite.errors import EngineError
from popo_lite.samplers.base import SamplingParams

ATTEMPTS = 4
FIRST_WAIT_SECONDS = 0.25
"""Before the second attempt; doubled before each further one, times a random factor in [0.5, 1.5]."""
SHORT_SECONDS = 10.0
"""For connecting, and for all that takes a healthy server no time."""
LOAD_SECONDS = 300.0
ANSWER_SECONDS = 3600.0
"""For one completion, the wait for its turn included."""
HEALTH_EVERY_SECONDS = 15.0
IDLE_SECONDS = 2.0
"""How long an idle connection is kept: less than the 5 s after which vLLM's web server closes it."""

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
REFUSED = frozenset({401, 403})
PROBE_TOKENS = (1, 2, 3, 4)
LEAST_LOGP = -9999.0
"""What vLLM writes for minus infinity."""


class ServerFault(Exception):  # noqa: N818  # a finding about one server, on which the sampler decides
    """This server cannot be used now. `advice` is there where starting it again is not the answer."""

    def __init__(self, reason: str, *, advice: str | None = None) -> None:
        super().__init__(reason)
        self.advice = advice


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One completion as it came: ids, end-of-sequence token included, and their log-probs in nats."""

    token_ids: tuple[int, ...]
    logps: tuple[float, ...]


class ServerClient:
    """One server. `adapter` names the adapter that it answers with.

    Every method raises ServerFault where the server cannot be used, after retries where trying again may help.
    """

    def __init__(self, url: str, *, token: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.adapter: str | None = None
        self._held: list[str] = []
        try:
            self._client = httpx.AsyncClient(
                base_url=self.url,
                headers={"Authorization": f"Bearer {token}"} if token else {},
                limits=httpx.Limits(max_connections=None, keepalive_expiry=IDLE_SECONDS),
                trust_env=False,  # no proxy or .netrc is to see prompts and token, or to replace the token
            )
        except httpx.InvalidURL as error:
            raise EngineError(
                f"{url} is no URL: {error}",
                where="rollout.server.base_urls",
                next_step='for instance "http://127.0.0.1:8000"',
            ) from error

    async def connect(self, *, context_tokens: int) -> None:
        """See that it is there, has room for `context_tokens`, and gives log-probs under the sampling temperature."""
        await self.check_health()
        models = self._json(await self._ask("GET", "/v1/models"), "/v1/models")
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
        """GET /health."""
        response = await self._ask("GET", "/health", attempts=attempts)
        if response.status_code != HTTPStatus.OK:
            raise ServerFault(f"it answers {response.status_code} to GET /health, which is not what a vLLM server does")

    async def watch(self) -> Never:
        """Ask for its health now and then, until it fails: a host that is gone leaves requests without an answer."""
        while True:
            await asyncio.sleep(HEALTH_EVERY_SECONDS)
            await self.check_health()

    async def load(self, name: str, folder: Path) -> None:
        """Make the adapter in `folder` the only one of ours that it holds, under `name`, which must be new."""
        path = "/v1/load_lora_adapter"
        try:
            response = await self._ask(
                "POST", path, {"lora_name": name, "lora_path": str(folder)}, seconds=LOAD_SECONDS
            )
        except ServerFault as fault:
            # It answers 500 to an adapter that it cannot hold; one that is dying does not pass the health check.
            await self.check_health(attempts=1)
            raise ServerFault(f"it does not take the adapter: {fault}", advice=fault.advice) from fault
        # A retry whose first attempt did succeed is told that the name is taken.
        if response.status_code != HTTPStatus.OK and "already been loaded" not in response.text:
            raise self._load_fault(response, folder)
        former, self._held, self.adapter = self._held, [*self._held, name], name
        for one in former:
            await self._unload(one)

    async def release(self) -> None:
        """Drop every adapter that it has from us."""
        self.adapter = None
        for name in list(self._held):
            await self._unload(name, attempts=1)

    async def complete(
        self, prompt: Sequence[int], *, params: SamplingParams, seed: int, stop_ids: frozenset[int]
    ) -> Answer:
        """One completion of `prompt` by the adapter. Raises EngineError where its log-probs are not finite."""
        limit = params.max_completion_length
        response = await self._ask(
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
        if response.status_code == HTTPStatus.NOT_FOUND:
            raise ServerFault(f"it lost its adapter, as a server does that is started anew: {_message(response)}")
        if "not JSON compliant" in response.text:
            raise self._not_finite()
        if response.status_code != HTTPStatus.OK:
            raise ServerFault(f"it refuses a request: {_message(response)}")
        choice = self._choice(response)
        if choice.get("finish_reason") not in ("stop", "length"):
            raise ServerFault(f'it broke off an answer ("{choice.get("finish_reason")}")')
        answer = self._answer(choice)
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
        await self._client.aclose()

    async def _unload(self, name: str, attempts: int = ATTEMPTS) -> None:
        response = await self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name}, attempts=attempts)
        # A server that was started anew does not know it, which is as good.
        if response.status_code not in (HTTPStatus.OK, HTTPStatus.NOT_FOUND):
            raise ServerFault(f"it does not drop an adapter: {_message(response)}")
        self._held.remove(name)

    async def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        seconds: float = SHORT_SECONDS,
        attempts: int = ATTEMPTS,
    ) -> httpx.Response:
        """The response, once it is neither missing nor of a status that may pass."""
        reason = ""
        for attempt in range(attempts):
            if attempt:
                await asyncio.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1) * SystemRandom().uniform(0.5, 1.5))
            try:
                response = await self._client.request(
                    method, path, json=body, timeout=httpx.Timeout(SHORT_SECONDS, read=seconds)
                )
            except httpx.TimeoutException:
                reason = f"no answer to {method} {path}"
                continue
            except httpx.TransportError as error:
                reason = f"no connection ({error or type(error).__name__})"
                continue
            if response.status_code in REFUSED:
                raise ServerFault(
                    f"it refuses the token with {response.status_code}",
                    advice="set POPO_SERVER_TOKEN to the key that the server was started with",
                )
            if response.status_code not in TRANSIENT:
                return response
            reason = f"it answers {response.status_code} to {method} {path}: {_message(response)}"
        raise ServerFault(reason)

    async def _top_logps(self, model: str, temperature: float) -> dict[str, float]:
        """The most likely first tokens' log-probs, given a few arbitrary tokens, by the base."""
        body = {**_drawing(PROBE_TOKENS, temperature=temperature, tokens=1), "model": model, "seed": 0, "logprobs": 5}
        response = await self._ask("POST", "/v1/completions", body)
        if response.status_code != HTTPStatus.OK:
            raise ServerFault(f"it refuses a request: {_message(response)}")
        choice = self._choice(response)
        self._answer(choice)
        try:
            return {str(token): float(logp) for token, logp in choice["logprobs"]["top_logprobs"][0].items()}
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ServerFault("its answers lack the log-probs that were asked for") from error

    def _json(self, response: httpx.Response, path: str) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise ServerFault(f"its answer to {path} is not JSON ({response.text[:60]!r})") from error

    def _choice(self, response: httpx.Response) -> dict[str, Any]:
        answer = self._json(response, "/v1/completions")
        try:
            return dict(answer["choices"][0])
        except (LookupError, TypeError, ValueError) as error:
            raise ServerFault("its answer to /v1/completions holds no completion") from error

    def _answer(self, choice: dict[str, Any]) -> Answer:
        try:
            ids = tuple(int(token) for token in choice["token_ids"])
            logps = tuple(float(logp) for logp in choice["logprobs"]["token_logprobs"])
        except (LookupError, TypeError, ValueError) as error:
            raise ServerFault(
                "its answers lack token ids or log-probs, which vLLM 0.32 gives where it is asked for them"
            ) from error
        if not ids or len(ids) != len(logps):
            raise ServerFault(f"an answer of {len(ids)} tokens came with {len(logps)} log-probs")
        return Answer(token_ids=ids, logps=logps)

    def _load_fault(self, response: httpx.Response, folder: Path) -> ServerFault:
        message = _message(response)
        if "No adapter found" in message:
            return ServerFault(
                f"it finds no adapter at {folder}",
                advice="rollout.server.shared_dir must be one folder under one path for trainer and servers, and readable",
            )
        if response.status_code == HTTPStatus.NOT_FOUND:
            return ServerFault(
                "it takes no adapters: it was started without --enable-lora or VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            )
        return ServerFault(f"it does not take the adapter: {message}")

    def _not_finite(self) -> EngineError:
        return EngineError(
            "the model's log-probs are not finite, so its weights or activations are not either",
            where=self.url,
            next_step="restart the servers, whose caches keep it, and go back to an earlier checkpoint with a lower "
            "optimizer.learning_rate",
        )


def _drawing(prompt: Sequence[int], *, temperature: float, tokens: int) -> dict[str, Any]:
    """A request's body but for model and seed. Every way to cut or bend the distribution is off by name.

    What is left out would be taken from the model's generation_config.json.
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


def _message(response: httpx.Response) -> str:
    """The server's own words where it has some, else the start of what it sent."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return response.text[:200] or f"status {response.status_code}"
