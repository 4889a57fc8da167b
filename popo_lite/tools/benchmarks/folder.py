"""Keep the answers of one evaluation in a folder, so that a killed one can resume.

.evaluation.lock, settings.json, environment.json, problems.jsonl, results.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from popo_lite.errors import CheckpointError, UserInputError
from popo_lite.run_folder import append_line, keep_lines, locked, read_lines, write_atomically
from popo_lite.tools.benchmarks.scores import Key, ProblemAnswers

_SHOWN_DIFFERENCES = 5


class EvaluationFolder:
    """Paths inside one evaluation's folder, and the reading and writing of its answers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings_path = path / "settings.json"  # all settings that the answers depend on
        self.environment_path = path / "environment.json"
        self.answers_path = path / "problems.jsonl"  # one line per weights, seed, benchmark and problem
        self.results_path = path / "results.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder, and create it if needed.

        Raises UserInputError if another evaluation has locked it or it holds something else.
        """
        lock = self.path / ".evaluation.lock"
        is_ours = lock.is_file() or self.settings_path.is_file()
        if self.path.exists() and not is_ours and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserInputError(
                "the folder is not empty and holds no evaluation",
                where=f"--output {self.path}",
                next_step="name another folder",
            )
        self.path.mkdir(parents=True, exist_ok=True)
        busy = UserInputError(
            "another evaluation is running in this folder",
            where=str(self.path),
            next_step="wait for it, stop it, or name another folder with --output",
        )
        with locked(lock, busy):
            yield

    def start(self, settings: Mapping[str, Any]) -> None:
        """Write the settings. Raises CheckpointError if the folder holds an evaluation with other settings."""
        if not self.settings_path.is_file():
            write_atomically(self.settings_path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
            return
        before = _flat(json.loads(self.settings_path.read_text(encoding="utf-8")))
        now = _flat(json.loads(json.dumps(settings)))
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if changed:
            shown = [f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed[:_SHOWN_DIFFERENCES]]
            if len(changed) > _SHOWN_DIFFERENCES:
                shown.append(f"{len(changed) - _SHOWN_DIFFERENCES} more differ")
            raise CheckpointError(
                f"the evaluation in this folder has other settings: {'; '.join(shown)}",
                where=str(self.settings_path),
                next_step="use the same settings to resume it, or name another folder with --output",
            )

    def resume(self, chunks: Sequence[Sequence[Key]]) -> dict[Key, ProblemAnswers]:
        """Return the answers of all finished chunks by key, and delete those of unfinished ones from the file.

        A chunk, given by the keys of its lines, is sampled as one batch. Sampling an unfinished one again as a whole
        gives the lines that an evaluation without interruption writes.

        Raises CheckpointError if a line belongs to no chunk or occurs twice.
        """
        if not self.answers_path.is_file():
            return {}
        keep_lines(self.answers_path, lambda _: True)  # deletes an incomplete last line
        answers: dict[Key, ProblemAnswers] = {}
        planned = {key for chunk in chunks for key in chunk}
        for number, record in enumerate(read_lines(self.answers_path), 1):
            key = _key(record)
            if key not in planned or key in answers:
                raise CheckpointError(
                    f"line {number} {'repeats another one' if key in answers else 'is not of this evaluation'}",
                    where=str(self.answers_path),
                    next_step="the file was changed; restore it, or start again in another folder with --output",
                )
            answers[key] = ProblemAnswers(**record)
        finished = {key for chunk in chunks if answers.keys() >= set(chunk) for key in chunk}
        if len(finished) < len(answers):
            keep_lines(self.answers_path, lambda record: _key(record) in finished)
        return {key: line for key, line in answers.items() if key in finished}

    def append(self, answers: Sequence[ProblemAnswers]) -> None:
        """Append lines to the answers."""
        for line in answers:
            append_line(self.answers_path, asdict(line))


def _key(record: Mapping[str, Any]) -> Key:
    return record.get("weights", ""), record.get("seed", -1), record.get("benchmark", ""), record.get("problem", "")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
