"""Run checks in child processes, so that a crash, a hang or a broken library is one failed line. Free of torch."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import replace
from typing import Any, Self

import psutil

from popo_lite.installing import CHECKOUT
from popo_lite.redaction import redact
from popo_lite.tools.doctor.findings import CHECKS, REPORT, TERMINAL, Check, Finding

SHOWN_LINES, KEPT_LINES, KEPT_BYTES = 3, 30, 20_000
"""Lines and bytes at the end of what a process that died has printed: shown, and kept for the bug report."""
NOISE = ("Extension modules:", "Fatal Python error: ", "<no Python frame>")


class Worker:
    """A process that runs checks one after another; after one that dies or hangs, the next gets a new process."""

    def __init__(self, command: tuple[str, ...] = ("-P", "-m", "popo_lite.tools.doctor")) -> None:
        self._command = [sys.executable, *command]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, check: Check) -> Iterator[Finding]:
        """Yield the findings of `check`; a failed one if its process ends, or takes longer than the check may."""
        if check.alone:
            self._end()
        process = self._process or self._start()
        end = time.monotonic() + check.seconds
        try:
            assert process.stdin is not None  # noqa: S101
            process.stdin.write(f"{check.name}\n")
            process.stdin.flush()
        except OSError:
            pass  # it is dead, which the line that does not come says
        start = time.monotonic()
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                yield self._failure(check, f"it did not end within {check.seconds:.0f} seconds")
                return
            if line is None:
                code = process.wait()
                how = _signal_name(code) if code < 0 else f"exit code {code}"
                yield self._failure(check, f"its process ended ({how})")
                return
            answer = json.loads(line)
            if "done" in answer:
                if check.alone:
                    self._end()
                return
            yield replace(Finding(**answer), seconds=time.monotonic() - start)

    def _start(self) -> subprocess.Popen[str]:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `_end`
        pipe, environment = subprocess.PIPE, dict(os.environ)
        if CHECKOUT is not None:  # the child must check this copy, not one that is installed
            known = environment.get("PYTHONPATH")
            environment["PYTHONPATH"] = f"{CHECKOUT}{os.pathsep}{known}" if known else str(CHECKOUT)
        self._process = process = subprocess.Popen(
            self._command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, encoding="utf-8", env=environment,
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, self._lines.put), daemon=True).start()
        return process

    def _failure(self, check: Check, what: str) -> Finding:
        tail = self._end()
        last = [line for line in tail if line.strip() and not line.startswith(NOISE)][-SHOWN_LINES:]
        shown = f"{what}; it printed last: {' | '.join(last)}" if last else what
        return Finding(name=check.name, status="failed", what=shown, next_step=REPORT, facts={"stderr": tail},
                       seconds=check.seconds if "did not end" in what else 0.0)  # fmt: skip

    def _end(self) -> list[str]:
        """End the process and all that it started; return the last lines that it printed."""
        process, self._process = self._process, None
        if process is None:
            return []
        try:
            family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        except psutil.NoSuchProcess:
            family = []
        for one in family:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait()
        with self._errors as errors:
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - KEPT_BYTES))
            return redact(errors.read().decode("utf-8", "replace")).splitlines()[-KEPT_LINES:]


def run_checks(quick: bool, begin: Callable[[str], None]) -> Iterator[Finding]:
    """Yield the findings of all checks; `quick` leaves out slow ones. `begin` gets the name of a check that starts."""
    gpus, failed = 0, set[str]()
    with Worker() as worker:
        for check in CHECKS:
            if reason := _left_out(check, quick, gpus, failed):
                yield Finding(name=check.name, status="skipped", what=f"not checked: {reason}")
                continue
            begin(check.name)
            # The terminal is this process's own.
            for finding in check.load()() if check is TERMINAL else worker.run(check):
                gpus = finding.facts.get("gpus", gpus) if finding.name == "torch" else gpus
                failed |= {check.name} if finding.status == "failed" else set()
                yield finding


def _left_out(check: Check, quick: bool, gpus: int, failed: Set[str]) -> str | None:
    """Return why a check is not made, or None."""
    if check.needs in failed:
        return f"{check.needs} failed"
    if check.needs == "GPU" and not gpus:
        return "no GPU"
    if quick and check.slow == "always":
        return "--quick"
    if quick and check.slow == "without a GPU" and not gpus:
        return "no GPU, and --quick"
    return None


def _read(stream: Any, put: Callable[[str | None], None]) -> None:
    for line in stream:
        put(line)
    put(None)


def _signal_name(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
