"""`popo-lite compare`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command(short_help="Compare runs and sweeps.")
@click.argument(
    "sources",
    metavar="RUN_OR_SWEEP...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for the page; default <SWEEP>/comparison for one sweep, else comparison in the current folder.",
)
@click.option(
    "--reach",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.8,
    show_default=True,
    help="Training pass rate to which time and tokens are counted.",
)
@click.option("as_json", "--json", is_flag=True, help="Print the figures as JSON and nothing else.")
def compare(sources: tuple[Path, ...], output: Path | None, reach: float, as_json: bool) -> None:
    """Compare runs, grouped by variant: what they reach, what they cost, and how they got there.

    A sweep's folder brings its variants; single runs whose recipes differ in nothing but the seed form a group. The
    first group is the one that the others are held against, paired by seed.

    Writes comparison.png, comparison.html (one file, nothing else needed) and comparison.json. See
    docs/experiments.md for what every figure means.
    """
    from popo_lite.run_folder import write_atomically
    from popo_lite.tools.sweep.compare import compare as measure
    from popo_lite.tools.sweep.compare_report import compare_report, html_page
    from popo_lite.tools.sweep.folder import SweepFolder, writing
    from popo_lite.tools.sweep.plots import write_png

    comparison = measure(sources, reach=reach)
    if output is None:
        one_sweep = len(sources) == 1 and SweepFolder(sources[0]).sweep_path.is_file()
        output = (sources[0] if one_sweep else Path()) / "comparison"
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "comparison.json", json.dumps(comparison) + "\n")
        write_png(comparison, output / "comparison.png")
        page = html_page(comparison, (output / "comparison.png").read_bytes())
        write_atomically(output / "comparison.html", page)
    if as_json:
        without_curves = [{key: group[key] for key in group if key != "curves"} for group in comparison["groups"]]
        click.echo(json.dumps({**comparison, "groups": without_curves}))
        return
    compare_report(comparison)
    click.echo(f"Page of plots\n  {output / 'comparison.html'}\n  {output / 'comparison.png'}")
