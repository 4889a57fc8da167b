"""Upload checkpoints to the Hub, in the process of `child_main`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from popo_lite.errors import PopoError
from popo_lite.recipe import Recipe
from popo_lite.tools.export.folder import ExportReport, describe, save_tokenizer, write_adapter
from popo_lite.tools.export.upload import plan_upload, upload
from popo_lite.tools.public import known_as


class Uploader:
    """Write what an exported adapter has into a folder, and upload it."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._recipe, self._folder = Recipe.model_validate(settings["recipe"]), Path(settings["folder"])
        self._repo_id, self._where = str(settings["repo_id"]), str(settings["where"])

    def upload(
        self, step: int, adapter: str, adapter_sha256: str, summary: Mapping[str, Any], own: Sequence[str]
    ) -> dict[str, str]:
        """Return the address of the repository, or the failure. `own` are hashes of the adapters that it may hold."""
        try:
            self._write(step, Path(adapter), adapter_sha256, summary)
            done = upload(
                plan_upload(self._folder, self._repo_id),
                message=f"Checkpoint after step {step} of {self._recipe.train.steps}",
                private=self._recipe.output.hub_private_repo,
                may_replace=lambda there: there.get("what") == "adapter" and there.get("adapter_sha256") in own,
                where=self._where,
            )
        except PopoError as error:
            return {"failure": error.what}
        except Exception as error:  # of a library: the next checkpoint may succeed
            return {"failure": f"{type(error).__name__}: {error}"}
        return {"url": str(done["url"])}

    def _write(self, step: int, adapter: Path, adapter_sha256: str, summary: Mapping[str, Any]) -> None:
        folder, recipe = self._folder, self._recipe
        if not any(folder.iterdir()):
            save_tokenizer(recipe, folder)  # the same for every checkpoint
        write_adapter(recipe, adapter, folder)
        report = ExportReport(
            folder=folder,
            checkpoint=step,
            of_steps=recipe.train.steps,
            what="adapter",
            weights="policy",
            base=known_as(recipe.model.id),
            dtype=None,
            merged_into=None,
            adapter_sha256=adapter_sha256,
        )
        if (failure := describe(folder, report, recipe, summary)) is not None:
            raise failure

    def close(self, *, finished: bool) -> None:
        """Leave the folder to the run, which made it."""
