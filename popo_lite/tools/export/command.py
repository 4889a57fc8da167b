"""`popo-lite export`, and the upload to the Hugging Face Hub with the login of `hf auth login`."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from popo_lite.errors import ExportError, UserInputError
from popo_lite.tools.checkpoint_option import checkpoint_option
from popo_lite.tools.completion import complete_run
from popo_lite.trust import trust_option

if TYPE_CHECKING:
    from popo_lite.tools.export.pipeline import ExportReport

WEIGHT_FILES = ["model*.safetensors*", "adapter_model.safetensors", "adapter_config.json", "*.gguf", "Modelfile",
                "config.json", "generation_config.json"]  # fmt: skip
"""What an earlier push may have left behind; an adapter beside a merged model would be applied twice on loading."""
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
@click.option("--push-to-hub", "repo_id", metavar="USER/NAME", help="Upload the folder to the Hugging Face Hub.")
@click.option("--private", is_flag=True, help="Upload to a private repository.")
@click.option("--dry-run", is_flag=True, help="Show what --push-to-hub would upload, without network.")
@trust_option
@click.option("as_json", "--json", is_flag=True, help="Print the report as one JSON object.")
def export(run: Path, repo_id: str | None, private: bool, dry_run: bool, trust: bool, as_json: bool,
           **options: Any) -> None:  # fmt: skip
    """Turn RUN, a folder that `popo-lite train` made, into a model that others can load.

    A merged model is loaded again and compared with the trained policy on real prompts and in pass@1. With
    --push-to-hub, an export of the same adapter that is in the folder already is uploaded with your edits of its card,
    README.md. Only the card's line `model_id = ...`, which a GGUF file's card lacks, is changed, to USER/NAME.

    \b
    Example:
      popo-lite export runs/tiny_cpu-seed0
    """
    if repo_id is None and (private or dry_run):
        raise click.UsageError(f"{'--private' if private else '--dry-run'} goes with --push-to-hub USER/NAME")

    from popo_lite.run_folder import RunFolder

    folder = RunFolder(run)
    threads = folder.recipe().train.cpu_threads
    if repo_id is not None:
        _check_repo_id(repo_id)

    import torch
    from rich.text import Text

    from popo_lite.tools.console.output import open_console, progress, write
    from popo_lite.tools.export.pipeline import export_run
    from popo_lite.tools.export.verify import loss_of

    if threads:
        torch.set_num_threads(threads)
    report = export_run(folder, reuse=repo_id is not None, progress=progress, trust=trust, **options)
    upload = planned = None
    if repo_id is not None:
        path = report.folder / "README.md"
        written = path.read_text(encoding="utf-8")
        card = re.sub(r'^model_id = ".*"$', f'model_id = "{repo_id}"', written, count=1, flags=re.MULTILINE)
        path.write_text(card, encoding="utf-8")
        planned = {"repo_id": repo_id, "private": private, "card": card} if dry_run else None
        upload = None if dry_run else _push(report.folder, repo_id, private)
    if as_json:
        content = {"folder": str(report.folder), **report.content(), "reused": report.reused, "files": report.files}
        click.echo(json.dumps({**content, "upload": upload, "dry_run": planned}, allow_nan=False))
        return
    _print_report(report, upload)
    if loss := loss_of(report.verification):
        console = open_console(sys.stdout)
        console.print(Text(f"{loss} To keep more:", "bold red"))
        console.print(Text(f"  {_remedy_command(run, report)}\n", "cyan"), soft_wrap=True)
    if planned is not None:
        visibility = "private" if private else "public"
        write(f"Would be uploaded to {repo_id}, {visibility}. Its card, README.md:\n\n{planned['card']}", sys.stdout)


def _check_repo_id(repo_id: str) -> None:
    """Raise UserInputError for what cannot be the name of a repository."""
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not in __all__

    try:
        if "/" not in repo_id:
            raise ValueError("it lacks the user or organisation")
        validate_repo_id(repo_id)
    except ValueError as error:
        what, where = f"not the name of a repository: {error}", f"--push-to-hub {repo_id}"
        next_step = "write it as user/name; `hf auth whoami` says who is logged in"
        raise UserInputError(what, where=where, next_step=next_step) from error


def _print_report(report: ExportReport, upload: dict[str, Any] | None) -> None:
    from popo_lite.tools.console.output import table
    from popo_lite.tools.export.verify import base_of, table_of

    facts: dict[str, Any] = {"folder": report.folder, "what": report.what, "weights": report.weights}
    if report.checkpoint is not None:
        facts["checkpoint"] = f"after {report.checkpoint:,} of {report.of_steps:,} steps"
    facts["base"] = report.base
    if report.verification is not None:
        facts |= {"merged into": base_of(report.verification), "precision": report.gguf or report.dtype}
    facts |= {"repository": upload["url"], "visibility": "private" if upload["private"] else "public"} if upload else {}
    title = "Reused, as it was exported before" if report.reused else "Exported"
    table(title, ("", "this export"), list(facts.items()))
    if report.verification is not None:
        table("Merged against trained", *table_of(report.verification))
    table("Files", ("file", "bytes"), [(name, f"{size:,}") for name, size in report.files.items()])


def _remedy_command(run: Path, report: ExportReport) -> str:
    """Return the command of an export that keeps more, in a folder of its own."""
    from popo_lite.tools.export.verify import remedy

    better = remedy(str(report.merged_into), str(report.dtype), report.gguf)
    command = ["popo-lite", "export", str(run), "--weights", report.weights, *better.split()]
    command += [] if report.checkpoint is None else ["--checkpoint", str(report.checkpoint)]
    return shlex.join([*command, "--output", f"{report.folder}-{better.split()[-1]}"])


def _push(folder: Path, repo_id: str, private: bool) -> dict[str, Any]:
    """Upload `folder` to `repo_id` (created if missing), replacing earlier weights; return where and who can see it.

    Raises ExportError if the Hub refuses or cannot be reached, or for a private upload to a public repository.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi

    api, where = HfApi(), f"--push-to-hub {repo_id}"
    try:
        # Without --private the owner's own default decides.
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        is_private = bool(api.model_info(repo_id).private)
        if private and not is_private:
            what = f"{repo_id} exists and everybody can see it, so nothing was uploaded"
            next_step = f"make it private on its settings page, or name another one; the export is in {folder}"
            raise ExportError(what, where=f"{where} --private", next_step=next_step)
        message = "Upload by popo-lite export"
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, delete_patterns=WEIGHT_FILES
        )
    # Uploads of large files wrap what went wrong in a RuntimeError, and refused batches come as a ValueError.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        what, next_step = _explained(error)
        raise ExportError(f"{what}; the export is kept in {folder}", where=where, next_step=next_step) from error
    return {"repo_id": repo_id, "private": is_private, "url": f"{api.endpoint}/{repo_id}", "commit": commit.oid}


def _explained(error: BaseException) -> tuple[str, str]:
    """Return what the library's error, or the error that it wraps, means and what to do."""
    from httpx import TransportError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    what, first = f"the Hub refused: {reason}", "see https://status.huggingface.co"
    if status == 401:
        what, first = "the Hub does not know this login", "hf auth login"
    elif status == 403:
        what = "this login may not write there"
        first = "hf auth login with a token that may write, or a name of your own"
    elif isinstance(error, OfflineModeIsEnabled):
        what, first = "HF_HUB_OFFLINE forbids it", "set HF_HUB_OFFLINE=0"
    elif isinstance(error, TransportError):
        what, first = f"the Hub cannot be reached ({type(error).__name__}: {error})", "check the network"
    return what, f"{first}, then the same command again"
