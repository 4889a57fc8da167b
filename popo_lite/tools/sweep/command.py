"""`popo-lite sweep`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from popo_lite.tools.sweep.folder import SweepRun

FAILED = 1
INTERRUPTED = 130


@click.command(short_help="Train variants of a recipe with several seeds.")
@click.argument("sweep_file", metavar="SWEEP")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the sweep; default <output.dir>/<SWEEP>.")
@click.option("seeds", "--seeds", metavar="SEEDS", help="Seeds instead of the file's, such as 0-4 or 0,3.")
@click.option("overrides", "--set", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key of every variant.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at the same time.")
@click.option("--ignore-plan", is_flag=True, help="Start runs although the memory plan says that they do not fit.")
@click.option("--dry-run", is_flag=True, help="Check every recipe and list the runs; start nothing.")
@click.option("as_json", "--json", is_flag=True, help="Print the results as JSON at the end and nothing else.")
def sweep(
    sweep_file: str,
    output: Path | None,
    seeds: str | None,
    overrides: tuple[str, ...],
    jobs: int,
    ignore_plan: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train every variant of SWEEP with every seed: a TOML file, or the name of a shipped sweep.

    The same command goes on where it was stopped: finished runs are kept, an unfinished one is resumed, a failed one
    is tried again. Variants and seeds may be added; other changes are refused. Ctrl-C stops the running ones cleanly,
    twice they abandon their step and save, three times they are killed.

    A run that fails does not end the others; the exit code is 1 then. See docs/experiments.md.
    """
    from popo_lite.tools.sweep.file import load_sweep
    from popo_lite.tools.sweep.folder import SweepFolder, refuse_other_sweep

    asked = load_sweep(sweep_file, overrides, seeds)
    folder = SweepFolder(output if output is not None else Path(asked.base.output.dir).expanduser() / asked.name)
    refuse_other_sweep(folder, asked)
    runs = folder.runs(asked)
    if dry_run:
        _list_runs(runs, as_json=as_json)
        return

    from popo_lite.tools.console.output import table
    from popo_lite.tools.sweep.runner import execute, locked
    from popo_lite.tools.sweep.view import SweepView

    with locked(folder) as lock:
        refuse_other_sweep(folder, asked)  # again: another may have started here meanwhile
        folder.start_files(asked)
        with SweepView(len(runs), sum(run.finished for run in runs)) as view:
            try:
                outcome = execute(folder, runs, jobs=jobs, lock=lock, watcher=view, ignore_plan=ignore_plan)
            finally:
                results = folder.write_results(runs)
    if as_json:
        failures = [vars(failure) for failure in outcome.failures]
        click.echo(json.dumps({"folder": str(folder.path), "results": results, "failures": failures}))
    elif results:
        rows = [_result_row(line) for line in results]
        table("Finished runs", ("variant", "seed", "pass@1", "trained tokens", "seconds"), rows)
    options = [*(["--jobs", str(jobs)] if jobs > 1 else []), *(["--ignore-plan"] if ignore_plan else [])]
    go_on = shlex.join(["popo-lite", "sweep", str(folder.sweep_path), "--output", str(folder.path), *options])
    if outcome.failures:
        told = "\n".join(f"  {one.variant} seed {one.seed}: {one.message}\n    {one.log}" for one in outcome.failures)
        click.echo(f"{len(outcome.failures)} of {len(runs)} runs failed:\n{told}", err=True)
    if outcome.interrupted:
        click.echo(f"stopped with {len(results)} of {len(runs)} runs done. To go on:\n  {go_on}", err=as_json)
        raise SystemExit(INTERRUPTED)
    if outcome.failures:
        click.echo(f"To try again:\n  {go_on}", err=True)
        raise SystemExit(FAILED)
    click.echo(f"Next\n  popo-lite compare {shlex.quote(str(folder.path))}", err=as_json)


def _list_runs(runs: list[SweepRun], *, as_json: bool) -> None:
    listed: list[dict[str, Any]] = [
        {
            "variant": run.variant.name,
            "seed": run.seed,
            "overrides": dict(run.variant.overrides),
            "state": "finished" if run.finished else "unfinished" if run.begun else "new",
            "run": str(run.folder.path),
        }
        for run in runs
    ]
    if as_json:
        click.echo(json.dumps({"runs": listed}))
        return
    from popo_lite.tools.console.output import table
    from popo_lite.tools.sweep.file import as_options

    rows = [(row["variant"], row["seed"], row["state"], " ".join(as_options(run.variant.overrides)), row["run"])
            for row, run in zip(listed, runs, strict=True)]  # fmt: skip
    table(f"{len(runs)} runs", ("variant", "seed", "state", "differs in", "folder"), rows)


def _result_row(line: dict[str, Any]) -> tuple[str, ...]:
    rate = line["pass_at_1"]
    return (
        line["variant"],
        str(line["seed"]),
        "-" if rate is None else f"{rate:.1%}",
        f"{line['trained_tokens']:,}",
        f"{line['seconds']:.0f}",
    )
