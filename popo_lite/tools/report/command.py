"""Define `popo-lite report`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from popo_lite.tools.completion import complete_run


@click.command()
@click.argument("run", type=click.Path(path_type=Path), shell_complete=complete_run, metavar="RUN")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write; default RUN/report.html."
)
@click.option("as_json", "--json", is_flag=True, help="Print path, state and verdict as one JSON object.")
def report(run: Path, output: Path | None, as_json: bool) -> None:
    """Write what RUN did as one HTML page, which needs no network: curves, answers, cost, doubts, recipe.

    A run that still trains, or was stopped, has a page as well; the same command writes it again. Nothing is loaded and
    no code of the run is run. See docs/report.md.

    \b
    Example:
      popo-lite report runs/tiny_cpu-seed0
    """
    from popo_lite.tools.console.output import write
    from popo_lite.tools.report.page import write_report

    written = write_report(run, output)
    if as_json:
        click.echo(json.dumps({**written._asdict(), "path": str(written.path)}))
        return
    shown = f"{written.verdict}\n\nPage\n  {written.path}\nNext\n  {written.next_command}"
    write(shown, sys.stdout)
