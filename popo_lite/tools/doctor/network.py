"""Check the Hugging Face Hub: reachable, through which proxy, and with which login. Free of torch."""

from __future__ import annotations

import os
from collections.abc import Iterator

from popo_lite.redaction import redact
from popo_lite.tools.doctor.findings import Finding

TIMEOUT_SECONDS = 8.0
PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
REFUSED = (401, 403)


def hub() -> Iterator[Finding]:
    """Yield whether models can be downloaded, and whether the token is good.

    The token is sent to the Hub, or to the mirror that HF_ENDPOINT names, as every download sends it.
    """
    import httpx
    from huggingface_hub import constants, get_token

    endpoint = constants.ENDPOINT
    proxy = next((f"{name}={redact(os.environ[name])}" for name in PROXIES if os.environ.get(name)), None)
    route = redact(endpoint) + (f", through {proxy}" if proxy else "")
    facts = {"endpoint": redact(endpoint), "proxy": proxy, "offline": constants.HF_HUB_OFFLINE}
    if constants.HF_HUB_OFFLINE:
        what = "not checked: HF_HUB_OFFLINE is set, so models and data come from the cache alone"
        yield Finding(
            name="hub", status="skipped", what=what, next_step="unset HF_HUB_OFFLINE to download", facts=facts
        )
        return
    try:
        with httpx.Client(timeout=TIMEOUT_SECONDS, follow_redirects=True) as client:
            answer = client.head(endpoint)
            if answer.status_code >= 400:
                raise httpx.HTTPError(f"it answers {answer.status_code} {answer.reason_phrase}")
            yield Finding(name="hub", status="ok", what=f"{route} answers", facts=facts)
            token = get_token()
            if token is None:
                what = "no token: public models and data load without one"
                next_step = "for gated models and popo-lite push: hf auth login"
                yield Finding(name="hub", status="ok", what=what, next_step=next_step)
                return
            whoami = client.get(f"{endpoint}/api/whoami-v2", headers={"Authorization": f"Bearer {token}"})
    except (httpx.HTTPError, httpx.InvalidURL, ImportError, ValueError) as error:  # ImportError: a SOCKS proxy
        what = f"{route} cannot be reached: {redact(str(error)) or type(error).__name__}; tiny_cpu needs no network"
        next_step = (
            "check the network, https_proxy and HF_ENDPOINT; with all models in the cache, export HF_HUB_OFFLINE=1"
        )
        yield Finding(name="hub", status="warning", what=what, next_step=next_step, facts=facts)
        return
    if whoami.status_code in REFUSED:
        what = "the Hub refuses the token, and with it even downloads of public models"
        source = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the saved login"
        yield Finding(name="hub", status="failed", what=f"{what} (from {source})", next_step=_renew(source))
    elif whoami.status_code != 200:
        yield Finding(name="hub", status="warning", what=f"the token was not checked: {whoami.status_code}")
    else:
        role = whoami.json().get("auth", {}).get("accessToken", {}).get("role", "unknown")
        what = f"the token is valid ({redact(str(role))})"
        yield Finding(name="hub", status="ok", what=what, facts={"role": role})


def _renew(source: str) -> str:
    return "hf auth login, with a token of https://huggingface.co/settings/tokens" + (
        ", and unset HF_TOKEN" if source == "HF_TOKEN" else ""
    )
