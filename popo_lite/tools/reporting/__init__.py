"""Send a run's events elsewhere: to trackers, and its checkpoints to the Hub."""

from __future__ import annotations

from popo_lite.callbacks import Callback
from popo_lite.recipe import Recipe
from popo_lite.run_folder import RunFolder


def reporters(run: RunFolder, recipe: Recipe) -> list[Callback]:
    """Return the callbacks that `[output]` asks for. Raises UserInputError if a package or a login is missing."""
    callbacks: list[Callback] = []
    if recipe.output.report_to:
        from popo_lite.tools.reporting.trackers import open_trackers

        callbacks += open_trackers(run, recipe)
    if recipe.output.hub_model_id is not None:
        from popo_lite.tools.reporting.hub import HubUploads

        callbacks.append(HubUploads(run, recipe))
    return callbacks
