"""Write what every export folder has: adapter or tokenizer, export.json and the model card."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from popo_lite.errors import ExportError
from popo_lite.policy.adapters import ADAPTER_FILE, read_config
from popo_lite.policy.load import load_tokenizer
from popo_lite.recipe import Recipe
from popo_lite.run_folder import write_json
from popo_lite.tools.export import REPORT_FILE
from popo_lite.tools.export.card import inert, model_card
from popo_lite.tools.public import is_local

NOT_WRITABLE = (errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS)


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """Describe an export.

    `dtype`, `merged_into` and `verification` are None for an adapter. `merged_into` is "trained" or "original"; the two
    are the same for a base that was not quantised, which counts as "trained". `gguf` is None for safetensors.
    `checkpoint` is the number of steps of the checkpoint that was exported, of the recipe's `of_steps`; both are None
    for the end of a run.
    """

    folder: Path
    what: str
    weights: str
    base: str
    dtype: str | None
    merged_into: str | None
    adapter_sha256: str
    checkpoint: int | None = None
    of_steps: int | None = None
    gguf: str | None = None
    verification: dict[str, Any] | None = None

    @property
    def files(self) -> dict[str, int]:
        """Bytes of every file in the folder."""
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in found}

    def content(self) -> dict[str, Any]:
        """Return the content of export.json."""
        return {key: value for key, value in asdict(self).items() if key != "folder"}


def write_adapter(recipe: Recipe, adapter: Path, folder: Path) -> None:
    """Copy an adapter without the local path of its base."""
    shutil.copyfile(adapter / ADAPTER_FILE, folder / ADAPTER_FILE)
    config = read_config(adapter)
    config["base_model_name_or_path"] = None if is_local(recipe.model.id) else recipe.model.id
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_tokenizer(recipe: Recipe, folder: Path) -> None:
    """Write the tokenizer with the chat template of the training."""
    tokenizer: Any = load_tokenizer(recipe.model)
    tokenizer.chat_template = recipe.data.chat_template or tokenizer.chat_template
    tokenizer.save_pretrained(str(folder))


def describe(folder: Path, report: ExportReport, recipe: Recipe, summary: Mapping[str, Any]) -> Exception | None:
    """Write export.json and the card. Return what kept the card from being written: one line stands for it then."""
    write_json(folder / REPORT_FILE, report.content())
    card, failure = f"# {inert(report.base)}, trained with popo-lite\n", None
    try:
        card = model_card(recipe, summary, weights=report.weights, dtype=report.dtype, gguf=report.gguf,
                          verification=report.verification)  # fmt: skip
    except Exception as error:  # whatever it is, it must not cost the model that was written and checked
        failure = error
    (folder / "README.md").write_text(card, encoding="utf-8")
    return failure


@contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to fill. It becomes `target` when the block ends, and is removed if the block raises."""
    target = target.absolute()
    parent = next(parent for parent in target.parents if parent.exists())
    partial = parent / f".{'-'.join(target.relative_to(parent).parts)}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir()
        yield partial
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(target)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        what = f"the export could not be written: {error.strerror}"
        next_step = "name a folder with enough space that can be written to with --output"
        raise ExportError(what, where=str(target), next_step=next_step) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
