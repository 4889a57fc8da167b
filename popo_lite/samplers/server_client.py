"""One vLLM server over HTTP, through openai's client."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never

from pydantic import AliasPath, BaseModel, Field, ValidationError

from popo_lite.errors import EngineError
from popo_lite.recipe_rules import wrong_server_url
from popo_lite.redaction import redact
from popo_lite.samplers.base import Request, SamplingParams, not_finite

log = logging.getLogger(__name__)

ATTEMPTS = 4
"""Attempts of every request, with growing waits between them."""
SHORT_SECONDS = 10.0
"""Time limit to connect, and of requests that a healthy server answers at once."""
HEALTH_EVERY_SECONDS = 15.0
CONNECTIONS = 8
"""Connections at once by which servers behind a load balancer are found."""


class ServerError(Exception):
    """This server cannot be used now.

    `advice` is set if starting it again would not help, `status` if it refused a request.
    """

    def __init__(self, reason: str, *, advice: str | None = None, status: int | None = None) -> None:
        super().__init__(reason)
        self.advice, self.status = advice, status


class Answer(BaseModel):
    """Reply to POST /v1/completions. `token_ids` include the end-of-sequence token; log-probs are in nats."""

    token_ids: tuple[int, ...] = Field(validation_alias=AliasPath("choices", 0, "token_ids"))
    logps: tuple[float, ...] = Field(validation_alias=AliasPath("choices", 0, "logprobs", "token_logprobs"))
    top_logps: dict[str, float] = Field({}, validation_alias=AliasPath("choices", 0, "logprobs", "top_logprobs", 0))
    finish_reason: str | None = Field(None, validation_alias=AliasPath("choices", 0, "finish_reason"))


def base_of(url: str) -> str:
    """Return the URL of a server without the /v1 that OpenAI's clients want."""
    return url.rstrip("/").removesuffix("/v1")


class ServerClient:
    """One server. It answers with `adapter`, and cannot be used if that is None; `error` says why.

    Every method raises ServerError if the server cannot be used, after retries if these may help.
    """

    def __init__(self, url: str, *, allow_http: bool = False) -> None:
        import httpx2
        import openai

        where = "rollout.server.base_urls"
        # Reading a recipe file checks this, too; a recipe may also be built in Python.
        if why := wrong_server_url(url, allow_http=allow_http):
            what, _, next_step = why.partition("; ")
            raise EngineError(f"{redact(url)} {what}", where=where, next_step=next_step or None)

        self.url = base_of(url)
        token = os.environ.get("POPO_SERVER_TOKEN", "").strip()
        self.adapter: str | None = None
        self.error: ServerError | None = None
        self._held: list[str] = []
        # Headers from the environment would replace the token, or send another service's keys to this server.
        foreign = [line.partition(":")[0] for line in os.environ.get("OPENAI_CUSTOM_HEADERS", "").lower().split("\n")]
        self._headers: dict[str, Any] = {
            name.strip(): openai.Omit() for name in ("openai-organization", "openai-project", *foreign)
        }
        self._headers["authorization"] = f"Bearer {token}" if token else openai.Omit()
        self._client = openai.AsyncOpenAI(
            base_url=self.url,
            api_key=token or "none",
            http_client=openai.DefaultAsyncHttpxClient(
                # vLLM's web server closes idle connections after 5 s; we must be first.
                limits=httpx2.Limits(max_connections=None, keepalive_expiry=2.0),
                # No proxy, .netrc or other host may see prompts and token.
                trust_env=False,
                follow_redirects=False,
            ),
        )

    async def connect(self, *, context_tokens: int) -> None:
        """Check its health, its context of `context_tokens`, and that log-probs follow the sampling temperature."""
        # A server that was set aside is most often still gone, and a step must not wait for it.
        await self.check_health(attempts=ATTEMPTS if self.error is None else 1)
        text = await self._ask("/v1/models")
        try:
            base = json.loads(text)["data"][0]  # adapters follow
            name, context = str(base["id"]), int(base["max_model_len"])
        except (LookupError, TypeError, ValueError) as error:
            raise ServerError(f"its list of models is not one of vLLM 0.32: {text[:60]}") from error
        if context < context_tokens:
            raise ServerError(
                f"its context is {context} tokens, and prompt and answer may take {context_tokens} (--max-model-len)"
            )
        spreads = []
        for temperature in (1.0, 0.5):
            answer = await self._draw([1, 2, 3], model=name, max_tokens=1, temperature=temperature, seed=0, logprobs=5)
            likeliest = sorted(answer.top_logps.values(), reverse=True)[:5]  # it may add the sampled token
            if len(likeliest) < 2:
                raise ServerError("its answers lack the log-probs that were asked for")
            spreads.append(likeliest[0] - likeliest[-1])
        if spreads[1] < 1.5 * spreads[0]:  # half the temperature doubles the differences between log-probs
            raise ServerError(
                "its log-probs ignore the temperature: it was started without --logprobs-mode processed_logprobs"
            )

    async def check_health(self, *, attempts: int = ATTEMPTS) -> None:
        """Ask whether it and its engines are alive."""
        await self._ask("/health", attempts=attempts)

    async def watch(self) -> Never:
        """Check its health regularly until it fails: requests to a host that is gone never end."""
        while True:
            await asyncio.sleep(HEALTH_EVERY_SECONDS)
            await self.check_health()

    async def load(self, name: str, folder: Path) -> None:
        """Make the adapter in `folder` our only one on the server, under `name`, which must be new."""
        body = {"lora_name": name, "lora_path": str(folder)}
        try:
            await self._ask("/v1/load_lora_adapter", body, seconds=300.0)
        except ServerError as error:
            # 500 can mean an adapter that it cannot hold; a dying server does not pass the health check.
            await self.check_health(attempts=1)
            reason, advice = f"it does not take the adapter: {error}", error.advice
            if "No adapter found" in reason:
                reason = f"it finds no adapter at {folder}"
                advice = "rollout.server.shared_dir must be readable under the same path by trainer and servers"
            elif error.status == 404:
                reason = "it takes no adapters: start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            # The name is taken if an earlier attempt succeeded and its reply was lost.
            if "already been loaded" not in reason:
                raise ServerError(reason, advice=advice) from error
        self._held.append(name)
        self.adapter = name
        await self._unload(self._held[:-1])

    async def check_adapter(self) -> None:
        """Check that all servers that answer at this URL hold the adapter: it may be that of a load balancer."""
        # At the same time, so that each has a connection of its own, which a balancer may give to another server.
        asked = [self._ask("/v1/models") for _ in range(CONNECTIONS)]
        for models in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(models, BaseException):
                raise models
            if f'"{self.adapter}"' not in models:
                reason = "several servers answer at this URL, and only one of them took the adapter"
                raise ServerError(reason, advice="name the URL of each of them, not of their load balancer")

    async def complete(self, request: Request, params: SamplingParams, stop_ids: frozenset[int]) -> Answer:
        """Return a completion by the adapter. Raises EngineError if its log-probs are not finite."""
        limit = request.max_tokens
        try:
            answer = await self._draw(
                request.prompt.token_ids,
                3600.0,  # with the wait for its turn
                model=self.adapter,
                max_tokens=limit,
                temperature=params.temperature,
                top_p=params.top_p,
                seed=request.seed,
                logprobs=0,  # the sampled token's own
                stop_token_ids=sorted(stop_ids),
            )
        except ServerError as error:
            if error.status == 404:
                raise ServerError(f"it lost its adapter, as a server does that was restarted: {error}") from error
            if "not JSON compliant" in str(error):  # JSON has no NaN
                raise not_finite(self.url) from error
            raise
        if answer.finish_reason not in ("stop", "length"):
            raise ServerError(f'it broke off an answer ("{answer.finish_reason}")')
        if not all(logp > -9999 for logp in answer.logps):  # vLLM writes -9999 for minus infinity; NaN fails too
            raise not_finite(self.url)
        stops = [token in stop_ids for token in answer.token_ids]
        if any(stops[:-1]) or not (stops[-1] or len(stops) == limit) or len(stops) > limit:
            raise ServerError(
                f"an answer of {len(stops)} tokens ends with token {answer.token_ids[-1]}, and answers end with one of "
                f"{sorted(stop_ids)} or at {limit} tokens: the server has another idea of where they end"
            )
        return answer

    async def close(self) -> None:
        """Unload our adapters if it can be used, and close its connections."""
        try:
            if self.adapter is not None:
                await self._unload(self._held, attempts=1)
        except ServerError as error:
            log.info("server %s keeps its adapter: %s", self.url, error)  # the run is over, nothing depends on it
        finally:
            await self._client.close()

    async def _unload(self, names: Sequence[str], attempts: int = ATTEMPTS) -> None:
        for name in list(names):
            try:
                await self._ask("/v1/unload_lora_adapter", {"lora_name": name}, attempts=attempts)
            except ServerError as error:
                if error.status != 404:  # it was restarted and does not know the adapter
                    raise
            self._held.remove(name)

    async def _draw(self, prompt: Sequence[int], seconds: float = SHORT_SECONDS, **options: Any) -> Answer:
        """Sample a completion. Every change to the distribution is switched off unless `options` name it."""
        body = {
            "prompt": list(prompt),
            # vLLM would take what is not set from the model's generation_config.json.
            **dict.fromkeys(("top_p", "repetition_penalty"), 1.0),
            **dict.fromkeys(("min_p", "presence_penalty", "frequency_penalty"), 0.0),
            "top_k": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # else tokens with equal text share an entry
        }
        text = await self._ask("/v1/completions", body | options, seconds=seconds)
        try:
            answer = Answer.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or text[:60]
            raise ServerError(f"its answer is not one of vLLM 0.32 ({place}: {first['msg']})") from error
        if not answer.token_ids or len(answer.token_ids) != len(answer.logps):
            raise ServerError(f"an answer of {len(answer.token_ids)} tokens came with {len(answer.logps)} log-probs")
        return answer

    async def _ask(
        self, path: str, body: dict[str, Any] | None = None, *, seconds: float = SHORT_SECONDS, attempts: int = ATTEMPTS
    ) -> str:
        """POST `body`, or GET if there is none; return the text of the reply."""
        import openai

        timeout = openai.Timeout(SHORT_SECONDS, read=seconds, pool=None)
        options: Any = {"max_retries": attempts - 1, "timeout": timeout, "headers": self._headers}
        request = f"GET {path}" if body is None else f"POST {path}"
        try:
            if body is None:
                return await self._client.get(path, cast_to=str, options=options)
            return await self._client.post(path, cast_to=str, body=body, options=options)
        except openai.APITimeoutError as error:
            raise ServerError(f"no answer to {request}") from error
        except openai.APIConnectionError as error:
            # Without the request: a host that is gone has one reason, and is reported once.
            raise ServerError(f"no connection ({error.__cause__ or error})") from error
        except openai.APIStatusError as error:
            status = error.status_code
            if status in (401, 403):
                advice = "set POPO_SERVER_TOKEN to the key that the server was started with"
                raise ServerError(f"it refuses the token with {status}", advice=advice) from error
            message = error.body.get("message") if isinstance(error.body, dict) else None
            message = message or error.response.text[:200] or "no text"
            raise ServerError(f"it answers {status} to {request}: {message}", status=status) from error
