"""`popo-lite export`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from popo_lite.tools.export.hub import Upload
    from popo_lite.tools.export.pipeline import ExportReport


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option(
    "--what",
    type=click.Choice(["merged", "adapter"]),
    default="merged",
    show_default=True,
    help="A whole model that loads without PEFT, or the adapter alone.",
)
@click.option(
    "--weights",
    type=click.Choice(["policy", "siamese"]),
    default="policy",
    show_default=True,
    help="The trained adapter, or its running average.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Folder to make; default RUN/export/<what>-<weights>.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Precision of a merged model; default as in the run's recipe.",
)
@click.option(
    "--prompts",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Prompts on which a merged model is compared with the trained one, at most eval.problems.",
)
@click.option("--push-to-hub", "repo_id", metavar="USER/NAME", help="Upload the folder to the Hugging Face Hub.")
@click.option("--private", is_flag=True, help="Upload to a private repository.")
@click.option("--dry-run", is_flag=True, help="Show what --push-to-hub would upload, without network.")
@click.option("as_json", "--json", is_flag=True, help="Print the report as one JSON object.")
def export(
    run: Path,
    what: str,
    weights: str,
    output: Path | None,
    dtype: str | None,
    prompts: int,
    repo_id: str | None,
    private: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Turn RUN, a folder that `popo-lite train` left, into a model that others can load.

    A merged model is loaded again and compared with the trained policy on real prompts. With --push-to-hub an
    export that lies in the folder already is uploaded as it stands, so its card can be edited first.
    """
    if repo_id is None and (private or dry_run):
        raise click.UsageError(f"{'--private' if private else '--dry-run'} goes with --push-to-hub USER/NAME")
    if what == "adapter" and dtype is not None:
        raise click.UsageError("--dtype is for merged models; an adapter is copied as it was trained")

    from popo_lite.run_folder import RunFolder

    folder = RunFolder(run)
    threads = folder.recipe().train.cpu_threads

    import torch

    from popo_lite.tools.console.output import progress
    from popo_lite.tools.export.hub import check_repo_id, name_in_card, push
    from popo_lite.tools.export.pipeline import export_run

    if repo_id is not None:
        check_repo_id(repo_id)
    if threads:
        torch.set_num_threads(threads)
    report = export_run(
        folder,
        what=what,
        weights=weights,
        output=output,
        dtype=dtype,
        prompts=prompts,
        reuse=repo_id is not None,
        progress=progress,
    )
    upload = push(report.folder, repo_id, private=private) if repo_id is not None and not dry_run else None
    card = name_in_card(report.folder, repo_id) if repo_id is not None and dry_run else None
    if as_json:
        planned = {"repo_id": repo_id, "private": private, "card": card} if dry_run else None
        content = {**report.as_json(), "upload": asdict(upload) if upload else None, "dry_run": planned}
        click.echo(json.dumps(content, allow_nan=False))
        return
    _print_report(report, upload)
    if dry_run:
        click.echo(
            f"Would be uploaded to {repo_id}, {'private' if private else 'public'}. Its card, README.md:\n\n{card}"
        )


def _print_report(report: ExportReport, upload: Upload | None) -> None:
    from popo_lite.tools.console.output import table

    facts = {"folder": report.folder, "what": report.what, "weights": report.weights, "base": report.base}
    if report.dtype is not None:
        facts["precision"] = report.dtype
    if upload is not None:
        facts |= {"repository": upload.url, "visibility": "private" if upload.private else "public"}
    table(
        "Reused, as it was exported before" if report.reused else "Exported", ("", "this export"), list(facts.items())
    )
    if report.verification is not None:
        table("Merged against trained", ("measure", "figure"), report.verification.rows())
    table("Files", ("file", "bytes"), [(name, f"{size:,}") for name, size in report.files.items()])
