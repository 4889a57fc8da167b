"""Seed random streams without state: a stream is a function of what it is for.

Nothing in a run draws from a generator that lives across steps. A sample's stream comes from (seed, step,
prompt, sample index), so the make-up of a batch cannot change it and a resumed run has nothing to restore.
"""

from __future__ import annotations

import hashlib


def stream_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that is a pure function of `parts`, the same on every machine and in every process."""
    # The type is part of the key: 1 and "1" are different streams. The separator cannot occur in an int.
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
