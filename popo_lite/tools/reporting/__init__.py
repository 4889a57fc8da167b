"""Send a run's events elsewhere: to trackers, and its checkpoints to the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from popo_lite.callbacks import Callback
from popo_lite.recipe import Recipe
from popo_lite.run_folder import RunFolder

if TYPE_CHECKING:
    from popo_lite.tools.reporting.reporter import Reporter


def reporters(run: RunFolder, recipe: Recipe) -> list[Callback]:
    """Return the callbacks that `[output]` asks for. Raises UserInputError if a package or a login is missing."""
    found: list[Reporter] = []
    if recipe.output.report_to:
        from popo_lite.tools.reporting.trackers import open_trackers

        found += open_trackers(run, recipe)
    if recipe.output.hub_model_id is not None:
        from popo_lite.tools.reporting.hub import HubUploads

        found.append(HubUploads(run, recipe))
    if not found:
        return []
    from popo_lite.tools.reporting.reporter import Reporters

    return [Reporters(found)]
