"""`popo-lite sweep` and `popo-lite compare`."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import click

from popo_lite.errors import UserInputError
from popo_lite.tools.completion import complete_run_or_sweep, complete_sweep
from popo_lite.trust import refuse_untrusted, trust_option

PATH = click.Path(path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
RATE = click.FloatRange(0, 1, min_open=True)


@click.command()
@click.argument("sweep_file", metavar="SWEEP", shell_complete=complete_sweep)
@click.option("--output", type=PATH, help="Folder of the sweep; default <output.dir>/<SWEEP>.")
@click.option("seeds", "--seeds", metavar="SEEDS", help="Seeds instead of the file's, such as 0-4 or 0,3.")
@click.option("overrides", "--set", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key of every variant.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at the same time.")
@click.option("--ignore-plan", is_flag=True, help="Start runs even if the memory plan says that they do not fit.")
@trust_option
@click.option("--dry-run", is_flag=True, help="Check every recipe and list the runs; start nothing.")
@click.option("as_json", "--json", is_flag=True, help="Print only the results, as JSON, at the end.")
def sweep(sweep_file: str, output: Path | None, seeds: str | None, overrides: tuple[str, ...], jobs: int,
          ignore_plan: bool, trust: bool, dry_run: bool, as_json: bool) -> None:  # fmt: skip
    """Train every variant of SWEEP with every seed: a TOML file, or the name of a shipped sweep.

    The same command continues a stopped sweep: finished runs are kept, an unfinished one is resumed, a failed one
    is retried. Variants and seeds may be added, and keys changed that `popo-lite resume` accepts freely, such as
    train.save_steps; other changes are refused. Ctrl-C stops the running processes after
    their step; a second one abandons the step and saves; a third kills them.
    A run that fails does not end the others; the exit code is 1 then. See docs/experiments.md.

    \b
    Example:
      popo-lite sweep tiny_components --dry-run
    """
    if os.name != "posix":  # a run cannot be stopped after its step there
        next_step = "use WSL2, or train the variants one by one with `popo-lite train RECIPE --set ...`"
        raise UserInputError("sweeps do not run on Windows", next_step=next_step)

    from popo_lite.tools.console.output import notify, table
    from popo_lite.tools.console.words import share
    from popo_lite.tools.sweep.folder import SweepFolder, as_options, load_sweep, refuse_other_sweep
    from popo_lite.tools.sweep.runner import SweepView, execute

    requested = load_sweep(sweep_file, overrides, seeds)
    folder = SweepFolder(output or Path(requested.base.output.dir).expanduser() / requested.name)
    refuse_other_sweep(folder, requested)
    runs = folder.runs(requested)
    if dry_run:
        listed: list[dict[str, Any]] = [
            {"variant": run.variant.name, "seed": run.seed, "state": run.state, "overrides": run.variant.overrides,
             "run": str(run.folder.path)} for run in runs]  # fmt: skip
        if as_json:
            click.echo(json.dumps({"runs": listed}))
        else:
            cells = [list({**run, "overrides": " ".join(as_options(run["overrides"]))}.values()) for run in listed]
            table(f"{len(runs)} runs", ("variant", "seed", "state", "differs in", "folder"), cells)
        return
    # Here and not in the runs' processes, for which all settings of the sweep are --set, as if the user typed them.
    refuse_untrusted([variant.recipe for variant in requested.variants], sweep_file, trust)
    with folder.locked() as lock:
        refuse_other_sweep(folder, requested)  # again: another may have started here meanwhile
        folder.start_files(requested)
        with SweepView(len(runs), sum(run.state == "finished" for run in runs)) as view:
            try:
                failures, interrupted = execute(folder, runs, jobs, lock, view, ignore_plan=ignore_plan)
            finally:
                results = folder.write_results(runs)
    if as_json:
        click.echo(json.dumps({"folder": str(folder.path), "results": results, "failures": failures}))
    elif results:
        rows = [(line["variant"], line["seed"], share(line["pass_at_1"]), f"{line['trained_tokens']:,}",
                 f"{line['seconds']:.0f}") for line in results]  # fmt: skip
        table("Finished runs", ("variant", "seed", "pass@1", "trained tokens", "seconds"), rows)
    if failures:
        click.echo(f"{len(failures)} of {len(runs)} runs failed:", err=True)
    for each in failures:
        notify(f"  {each['variant']} seed {each['seed']}: {each['message']}\n    {each['log']}")
    options = [*(["--jobs", str(jobs)] if jobs > 1 else []), *(["--ignore-plan"] if ignore_plan else [])]
    same_command = shlex.join(["popo-lite", "sweep", str(folder.sweep_path), "--output", str(folder.path), *options])
    if interrupted:
        click.echo(f"stopped with {len(results)} of {len(runs)} runs done. To continue:\n  {same_command}", err=as_json)
        raise SystemExit(130)  # 128 + SIGINT, as shells have it
    if failures:
        click.echo(f"To try again:\n  {same_command}", err=True)
        raise SystemExit(1)
    click.echo(f"Next\n  popo-lite compare {shlex.quote(str(folder.path))}", err=as_json)


@click.command()
@click.argument(
    "sources", metavar="RUN_OR_SWEEP...", nargs=-1, required=True, type=FOLDER, shell_complete=complete_run_or_sweep
)
@click.option("--output", type=PATH, help="Folder of the page; default comparison, for one sweep <SWEEP>/comparison.")
@click.option("--reach", type=RATE, default=0.8, show_default=True, help="Pass rate up to which costs are counted.")
@click.option("as_json", "--json", is_flag=True, help="Print only the figures, as JSON.")
def compare(sources: tuple[Path, ...], output: Path | None, reach: float, as_json: bool) -> None:
    """Compare runs, grouped by variant: final results, costs, and curves.

    The variants of a sweep's folder are groups; single runs whose recipes differ only in the seed form a group. The
    others are compared with the first group, paired by seed.

    Writes comparison.png, comparison.json and comparison.html, which needs no other file. See docs/experiments.md.

    \b
    Example:
      popo-lite compare runs/tiny_cpu-seed0
    """
    from popo_lite.lock import writing
    from popo_lite.run_folder import write_atomically
    from popo_lite.tools.sweep.compare import compare as compare_sources
    from popo_lite.tools.sweep.folder import SweepFolder
    from popo_lite.tools.sweep.report import draw, html_page, print_report

    comparison = compare_sources(sources, reach=reach)
    is_sweep = len(sources) == 1 and SweepFolder(sources[0]).sweep_path.is_file()
    output = output or (sources[0] if is_sweep else Path()) / "comparison"
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "comparison.json", json.dumps(comparison) + "\n")
        draw(comparison).savefig(output / "comparison.png")
        write_atomically(output / "comparison.html", html_page(comparison, (output / "comparison.png").read_bytes()))
    if as_json:
        for group in comparison["groups"]:
            del group["curves"]
        click.echo(json.dumps(comparison))
        return
    print_report(comparison)
    click.echo(f"Page of plots\n  {output / 'comparison.html'}\n  {output / 'comparison.png'}")
