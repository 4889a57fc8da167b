"""Define what a check reports, and the checks in their order. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any, Literal, NamedTuple

REPORT = "popo-lite doctor --bundle report.zip, and open an issue with that file"
"""Next step of a failure of unknown cause."""

Status = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor: what was found and, if it is not good, what to do. `facts` are for the JSON."""

    name: str
    status: Status
    what: str
    next_step: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return all fields."""
        return asdict(self)


class Check(NamedTuple):
    """A check, which is a function that yields findings, named `module:function` within this package.

    `seconds` is its time limit; what needs more is hung. An `alone` one gets a process of its own. Skip it if the
    check that `needs` names failed, or without a GPU if that is "GPU". `slow` ones are left out by --quick: always, or
    without a GPU.
    """

    name: str
    function: str
    seconds: float = 60
    alone: bool = False
    needs: str = ""
    slow: Literal["", "always", "without a GPU"] = ""

    def load(self) -> Callable[[], Iterator[Finding]]:
        """Return the function."""
        module, _, name = self.function.partition(":")
        found: Callable[[], Iterator[Finding]] = getattr(import_module(f"popo_lite.tools.doctor.{module}"), name)
        return found


TERMINAL = Check("terminal", "machine:terminal")
"""Runs in the doctor's own process, which has the terminal."""
CHECKS = (
    Check("system", "machine:system"),
    Check("memory", "machine:memory"),
    Check("disk", "machine:disk"),
    Check("shared memory", "machine:shared_memory"),
    TERMINAL,
    Check("packages", "packages:packages"),
    Check("driver", "machine:driver"),
    Check("torch", "kernels:torch_and_gpus", seconds=180),
    Check("nf4", "kernels:nf4", seconds=180, needs="torch"),
    Check("attention", "kernels:packed_attention", seconds=180, needs="torch"),
    Check("update", "kernels:update", seconds=180, needs="torch"),
    Check("compiled loss", "kernels:compiled_loss", seconds=420, needs="torch", slow="without a GPU"),
    Check("hub", "network:hub", seconds=45),
    Check("unsloth", "engines:unsloth", seconds=180, alone=True, needs="GPU", slow="always"),
    Check("vllm", "engines:vllm", seconds=600, alone=True, needs="torch", slow="always"),
    Check("measured step", "engines:measured_step", seconds=600, alone=True, needs="GPU", slow="always"),
)
