"""Ask the Hub once whether it can be reached, so that nothing waits for it again and again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

ASKED_SECONDS = 3.0
UNREACHABLE = {
    "OfflineModeIsEnabled",
    "ConnectionError",
    "LocalEntryNotFoundError",
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
}
"""Names of errors that say nothing about a model or dataset: the Hub was not asked, or did not answer."""


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Use the Hub's cache alone if the Hub does not answer. Its library would retry every file for half a minute."""
    from httpx import TransportError
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # public, not in __all__

    before = constants.HF_HUB_OFFLINE
    try:
        if not before:
            try:
                get_session().head(constants.ENDPOINT, timeout=ASKED_SECONDS)
            except TransportError:
                constants.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def is_unreachable(error: BaseException | None) -> bool:
    """Check whether an error came up only because the Hub was not asked or did not answer."""
    while error is not None:
        if type(error).__name__ in UNREACHABLE:
            return True
        error = error.__cause__ or error.__context__
    return False
