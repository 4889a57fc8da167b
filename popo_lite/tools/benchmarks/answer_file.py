"""The folder of an evaluation: its settings, one line a problem, and how a killed one goes on.

.evaluation.lock, settings.json, environment.json, problems.jsonl, results.json
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from popo_lite.errors import CheckpointError, UserInputError
from popo_lite.run_folder import append_line, environment, keep_lines, locked, read_lines, write_atomically
from popo_lite.tools.benchmarks.run import Chunk
from popo_lite.types import BenchmarkResult, ProblemAnswers

if TYPE_CHECKING:
    import torch

_SHOWN_DIFFERENCES = 5


@dataclass(frozen=True)
class EvaluationFolder:
    """Paths inside the folder of one evaluation, and what is done with them."""

    path: Path

    @property
    def settings_path(self) -> Path:
        """All that the answers follow from."""
        return self.path / "settings.json"

    @property
    def answers_path(self) -> Path:
        """One line for each of the weights, seeds, benchmarks and problems."""
        return self.path / "problems.jsonl"

    @property
    def results_path(self) -> Path:
        """What the answers come to."""
        return self.path / "results.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, which is made where there is none, alone.

        Raises UserInputError where another evaluation holds it, or it holds something else.
        """
        lock = self.path / ".evaluation.lock"
        known = lock.is_file() or self.settings_path.is_file()
        if self.path.exists() and not known and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserInputError(
                "the folder is not empty and holds no evaluation",
                where=f"--output {self.path}",
                next_step="name another folder",
            )
        self.path.mkdir(parents=True, exist_ok=True)
        busy = UserInputError(
            "another evaluation is at work in this folder",
            where=str(self.path),
            next_step="wait for it, stop it, or name another folder with --output",
        )
        with locked(lock, busy):
            yield

    def open(self, settings: Mapping[str, Any]) -> None:
        """Start an evaluation here, or go on with one of the same settings.

        Raises CheckpointError where the folder holds an evaluation with others.
        """
        plain = json.loads(json.dumps(settings))
        if self.settings_path.is_file():
            self._refuse_others(plain)
        else:
            write_atomically(self.settings_path, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")

    def keep_whole(self, chunks: Sequence[Chunk]) -> int:
        """How many of `chunks` have all their lines; lines beyond them are dropped, and will be written again.

        Sampled in the batches of an unbroken evaluation, the rest comes out as it would have there.
        """
        if not self.answers_path.is_file():
            return 0
        keep_lines(self.answers_path, lambda _: True)  # drops a torn last line
        found = self._keys()
        whole = lines = 0
        for chunk in chunks:
            if found[lines : lines + len(chunk.keys)] != chunk.keys:
                break
            whole, lines = whole + 1, lines + len(chunk.keys)
        remaining = [key for chunk in chunks[whole:] for key in chunk.keys]
        if found[lines:] != remaining[: len(found) - lines]:
            raise CheckpointError(
                f"line {lines + 1} and those after it are not what this evaluation writes next",
                where=str(self.answers_path),
                next_step="the file was changed; start anew in another folder with --output",
            )
        kept = iter(range(len(found)))
        keep_lines(self.answers_path, lambda _: next(kept) < lines)
        return whole

    def add(self, answers: Iterable[ProblemAnswers]) -> None:
        """Append lines."""
        for line in answers:
            append_line(self.answers_path, asdict(line))

    def answers(self) -> list[ProblemAnswers]:
        """Every line there is so far."""
        return [ProblemAnswers(**line) for line in self._lines()]

    def all_answers(self, chunks: Sequence[Chunk]) -> list[ProblemAnswers]:
        """Every line of `chunks`. Raises CheckpointError where the file holds anything else."""
        expected = [key for chunk in chunks for key in chunk.keys]
        if self._keys() != expected:
            raise CheckpointError(
                f"it does not hold the {len(expected)} lines of this evaluation, each once and in order",
                where=str(self.answers_path),
                next_step="the file was changed; start anew in another folder with --output",
            )
        return self.answers()

    def note_environment(self, device: torch.device) -> None:
        """Write the hardware and the versions that sampled last."""
        write_atomically(self.path / "environment.json", json.dumps(environment(device), indent=2) + "\n")

    def close(
        self, results: Sequence[BenchmarkResult], *, k: int, benchmarks: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Write and return what it came to; `benchmarks` says what each consisted of."""
        content = {
            "k": k,
            "benchmarks": benchmarks,
            "settings": json.loads(self.settings_path.read_text(encoding="utf-8")),
            "results": [asdict(result) for result in results],
        }
        write_atomically(self.results_path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return content

    def _lines(self) -> list[dict[str, Any]]:
        return read_lines(self.answers_path) if self.answers_path.is_file() else []

    def _keys(self) -> list[tuple[Any, ...]]:
        return [tuple(line.get(name) for name in ("weights", "seed", "benchmark", "problem")) for line in self._lines()]

    def _refuse_others(self, settings: Mapping[str, Any]) -> None:
        before, now = _flat(json.loads(self.settings_path.read_text(encoding="utf-8"))), _flat(settings)
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if changed:
            shown = [f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed[:_SHOWN_DIFFERENCES]]
            if len(changed) > _SHOWN_DIFFERENCES:
                shown.append(f"{len(changed) - _SHOWN_DIFFERENCES} more differ")
            raise CheckpointError(
                f"the evaluation in this folder has other settings: {'; '.join(shown)}",
                where=str(self.settings_path),
                next_step="repeat them to go on with it, or name another folder with --output",
            )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
