"""`popo-lite export`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from popo_lite.tools.checkpoint_option import checkpoint_option
from popo_lite.tools.completion import complete_run
from popo_lite.trust import trust_option

if TYPE_CHECKING:
    from popo_lite.tools.export.folder import ExportReport

WHAT = click.Choice(["merged", "adapter"])
WEIGHTS = click.Choice(["policy", "siamese"])
GGUF = click.Choice(["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0",
                     "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k"])  # fmt: skip
DTYPES = click.Choice(["float32", "bfloat16", "float16"])
BASES = click.Choice(["trained", "original"])
BASE_HELP = "Merge into the base as trained on (dequantised NF4), or into the original weights, which loses quality."
DTYPE_HELP = "Precision of a merged model; default as in the run's recipe, float32 with --gguf."
PROMPTS_HELP = "Prompts on which a merged model is compared with the trained one, at most eval.problems."
PROBLEMS_HELP = "Held-out problems for pass@1 beside the policy's, 0 for none; default as in the run's recipe."


@click.command(context_settings={"show_default": True})
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN", shell_complete=complete_run)
@click.option("--what", type=WHAT, default="merged", help="A whole model, which loads without PEFT, or the adapter.")
@click.option("--weights", type=WEIGHTS, default="policy", help="The trained adapter, or its running average.")
@checkpoint_option
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder to make; default RUN/export/<gguf or what>-<weights>[-step-N].",
)
@click.option("--dtype", type=DTYPES, help=DTYPE_HELP)
@click.option("--base", type=BASES, default="trained", help=BASE_HELP)
@click.option(
    "--gguf", type=GGUF, help="Write one GGUF file for llama.cpp, with weights of this type, and a Modelfile."
)
@click.option("--prompts", type=click.IntRange(min=1), default=32, help=PROMPTS_HELP)
@click.option("--problems", type=click.IntRange(min=0), help=PROBLEMS_HELP)
@trust_option
@click.option("as_json", "--json", is_flag=True, help="Print the report as one JSON object.")
def export(run: Path, trust: bool, as_json: bool, **options: Any) -> None:
    """Turn RUN, a folder that `popo-lite train` made, into a model that others can load.

    A merged model is loaded again and compared with the trained policy on real prompts and in pass@1.

    \b
    Example:
      popo-lite export runs/tiny_cpu-seed0 --output my-model --prompts 8 --problems 20
    """
    from popo_lite.run_folder import RunFolder

    folder = RunFolder(run)
    threads = folder.recipe().train.cpu_threads

    import torch

    from popo_lite.tools.console.output import progress
    from popo_lite.tools.export.pipeline import export_run

    if threads:
        torch.set_num_threads(threads)
    report = export_run(folder, progress=progress, trust=trust, **options)
    if as_json:
        content = {"folder": str(report.folder), **report.content(), "files": report.files}
        click.echo(json.dumps(content, allow_nan=False))
        return
    _print_report(run, report)


def _print_report(run: Path, report: ExportReport) -> None:
    from rich.text import Text

    from popo_lite.tools.console.output import open_console, safe, table
    from popo_lite.tools.export.verify import base_of, loss_of, table_of

    facts: dict[str, Any] = {"folder": report.folder, "what": report.what, "weights": report.weights}
    if report.checkpoint is not None:
        facts["checkpoint"] = f"after {report.checkpoint:,} of {report.of_steps:,} steps"
    facts["base"] = report.base
    if report.verification is not None:
        facts |= {"merged into": base_of(report.verification), "precision": report.gguf or report.dtype}
    table("Exported", ("", "this export"), list(facts.items()))
    if report.verification is not None:
        table("Merged against trained", *table_of(report.verification))
    table("Files", ("file", "bytes"), [(name, f"{size:,}") for name, size in report.files.items()])
    console = open_console(sys.stdout)
    if loss := loss_of(report.verification):
        console.print(Text(f"{loss} To keep more:", "bold red"))
        console.print(Text(f"  {_remedy_command(run, report)}\n", "cyan"), soft_wrap=True)
    # Not a table: commands are copied, so they must stay on one line.
    command = safe(f"popo-lite push {shlex.quote(str(report.folder))} USER/NAME --dry-run", console)
    console.print(Text("To the Hugging Face Hub", "bold"), Text(f"  {command}", "cyan"), sep="\n", soft_wrap=True)


def _remedy_command(run: Path, report: ExportReport) -> str:
    """Return the command of an export that keeps more, in a folder of its own."""
    from popo_lite.tools.export.verify import remedy

    better = remedy(str(report.merged_into), str(report.dtype), report.gguf)
    command = ["popo-lite", "export", str(run), "--weights", report.weights, *better.split()]
    command += [] if report.checkpoint is None else ["--checkpoint", str(report.checkpoint)]
    return shlex.join([*command, "--output", f"{report.folder}-{better.split()[-1]}"])
