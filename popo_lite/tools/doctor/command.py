"""Define `popo-lite doctor`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from popo_lite.errors import UserInputError
from popo_lite.tools.completion import complete_run


@click.command()
@click.option("--quick", is_flag=True, help="Leave out vLLM, unsloth, the measured step and, on a CPU, the compiler.")
@click.option("--bundle", type=click.Path(path_type=Path), metavar="FILE.zip", help="Also write a bug report.")
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    shell_complete=complete_run,
    metavar="RUN",
    help="Add a run's settings and log to --bundle.",
)
@click.option("as_json", "--json", is_flag=True, help="Print all findings as one JSON object and nothing else.")
def doctor(quick: bool, bundle: Path | None, run: Path | None, as_json: bool) -> None:
    """Check this machine: driver, packages, every kernel that a run uses, vLLM, the Hub.

    Each check runs in another process, so a library that crashes is one failed line. Checks that need a GPU are
    skipped without one, and the others run on the CPU. With a GPU a step of a shipped recipe is measured at the end,
    with random weights, and its memory compared with the plan's. That takes minutes; --quick takes under a minute.

    --bundle writes a bug report: the findings, versions, and settings, without tokens; --run adds a run's recipe, log
    and figures, without quotations and messages of exceptions. Nothing is sent; read the files before you send them.

    Exit code 0: nothing failed; 1: something did, and the line says what to do; 2: error in the command line.

    \b
    Example:
      popo-lite doctor --quick
      popo-lite doctor --quick --bundle report.zip --run runs/tiny_cpu-seed0
    """
    from popo_lite.run_folder import RunFolder
    from popo_lite.tools.console.output import open_console
    from popo_lite.tools.doctor import report
    from popo_lite.tools.doctor.findings import Finding
    from popo_lite.tools.doctor.processes import run_checks

    if run is not None and bundle is None:
        raise UserInputError("it only adds to a bug report", where="--run", next_step="give --bundle FILE.zip as well")
    folder = None if run is None else RunFolder(run)
    if folder is not None and not folder.recipe_path.is_file():
        folder.recipe()  # says what is missing
    if bundle is not None and (bundle.exists() or not bundle.absolute().parent.is_dir()):
        what = "is there already" if bundle.exists() else "is in a folder that does not exist"
        raise UserInputError(f"{bundle} {what}", where="--bundle", next_step="give the name of a new file")
    console, findings, start = open_console(sys.stdout), list[Finding](), time.perf_counter()
    if as_json:
        findings += run_checks(quick, lambda _: None)
    else:
        with console.status("", spinner="line") as status:  # shows nothing without a terminal
            for finding in run_checks(quick, lambda name: status.update(f"checking: {name}")):
                findings.append(finding)
                report.show(finding, console)
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "findings": [finding.as_json() for finding in findings],
        "counts": report.counted(findings),
        "seconds": seconds,
        "next": report.next_commands(findings),
    }
    if bundle is not None:
        from popo_lite.tools.doctor.bundle import write_bundle

        result["bundle"] = {"path": str(bundle), "files": write_bundle(bundle, result, folder)}
    if as_json:
        click.echo(json.dumps(result))
    else:
        report.show_summary(findings, seconds, console)
        if bundle is not None:
            report.show_bundle(bundle, result["bundle"]["files"], console)
    if any(finding.status == "failed" for finding in findings):
        raise SystemExit(1)
