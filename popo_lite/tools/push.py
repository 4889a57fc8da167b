"""`popo-lite push`: upload an export to the Hugging Face Hub."""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from popo_lite.errors import CheckpointError, ExportError, UserInputError
from popo_lite.tools.completion import complete_run
from popo_lite.tools.export import EXPORTS, REPORT_FILE

SAME = ("what", "weights", "gguf", "dtype", "merged_into", "adapter_sha256")
"""Values of export.json that are equal for two uploads of one export: its card and check may differ."""


@click.command()
@click.argument("export", type=click.Path(path_type=Path), shell_complete=complete_run, metavar="EXPORT")
@click.argument("repo_id", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Only you can see it. A repository that others can see is refused.")
@click.option("--dry-run", is_flag=True, help="Show what would be uploaded, and the card; no network, no login.")
@click.option("--overwrite", is_flag=True, help="Replace another model and its card; other files stay.")
@click.option("--revision", metavar="BRANCH", help="Branch to upload to; made if it is missing. Default main.")
@click.option("as_json", "--json", is_flag=True, help="Print the result as one JSON object.")
def push(
    export: Path, repo_id: str, private: bool, dry_run: bool, overwrite: bool, revision: str | None, as_json: bool
) -> None:
    """Upload EXPORT, a folder that `popo-lite export` made, to the Hugging Face Hub.

    EXPORT can also be a run with only one export. The card is uploaded with your edits; only its line
    `model_id = ...` names the repository. After a broken connection the same command continues.

    \b
    Example:
      popo-lite export runs/tiny_cpu-seed0 --what adapter --output my-adapter
      popo-lite push my-adapter me/my-model --private --dry-run
    """
    from popo_lite.formats import RESTORE, read_json, reading
    from popo_lite.tools.console.output import notify
    from popo_lite.tools.export.upload import check_login, check_repo_id, plan_upload, upload

    where = f"popo-lite push {shlex.quote(str(export))} {shlex.quote(repo_id)}"
    check_repo_id(repo_id, where)
    folder = _export_at(export, where)
    try:
        with reading(folder / REPORT_FILE):
            report = read_json(folder / REPORT_FILE)
            mine = {key: report[key] for key in SAME}
    except CheckpointError as error:
        next_step = "popo-lite export RUN --output ANOTHER_FOLDER" if error.next_step == RESTORE else error.next_step
        raise ExportError(error.what, where=error.where, next_step=next_step) from error
    plan = plan_upload(folder, repo_id, revision)
    result: dict[str, Any] = {
        "folder": str(folder), "repo_id": repo_id, "private": private, "revision": revision, "files": plan.files,
        "card": plan.card, "dry_run": dry_run,
    }  # fmt: skip
    if not dry_run:
        check_login(where)
        message = f"Upload {report['gguf'] or report['what']} ({report['weights']}) with popo-lite"
        with warnings.catch_warnings(record=True) as warned:
            done = upload(
                plan,
                message=message,
                private=private,
                may_replace=lambda there: overwrite or {key: there.get(key) for key in SAME} == mine,
                where=where,
            )
        for warning in warned:  # what the Hub thinks of the card
            notify(str(warning.message))
        result |= done
    if as_json:
        click.echo(json.dumps(result, allow_nan=False))
    else:
        options = {"--private": private, "--overwrite": overwrite, "--revision": revision}
        given = [part for name, value in options.items() if value for part in (name, value) if isinstance(part, str)]
        _print(result, report, shlex.join(["popo-lite", "push", str(export), repo_id, *given]))


def _export_at(path: Path, where: str) -> Path:
    """Return the export at `path`, or the only one of the run at `path`."""
    if (path / REPORT_FILE).is_file():
        return path
    found = sorted(file.parent for file in (path / EXPORTS).glob(f"*/{REPORT_FILE}"))
    if len(found) == 1:
        for folder in (path / EXPORTS, found[0]):
            if folder.is_symlink():  # in a stranger's run it may lead to any model of this machine
                what, next_step = "it is a link to a folder elsewhere", "name the folder that you want to upload"
                raise UserInputError(what, where=str(folder), next_step=next_step)
        return found[0]
    if found:
        what = f"the run has {len(found)} exports"
        commands = "\n".join(f"popo-lite push {shlex.quote(str(each))} ..." for each in found)
        raise UserInputError(what, where=where, next_step=f"name one of them:\n{commands}")
    what, next_step = "this is no export: export.json is missing", "name a folder that `popo-lite export` printed"
    if (path / "recipe.toml").is_file():
        what, next_step = "the run has no export yet", f"popo-lite export {shlex.quote(str(path))}"
    raise UserInputError(what, where=where, next_step=next_step)


def _print(result: Mapping[str, Any], report: Mapping[str, Any], command: str) -> None:
    """Print what was, or would be, uploaded; `command` uploads it."""
    from popo_lite.tools.console.output import table, write

    visibility = (
        "private" if result["private"] else "public, or as your account's default says; --private makes it private"
    )
    if result["dry_run"]:  # first, as it is long
        write(f"README.md, the card:\n\n{result['card']}", sys.stdout)
    facts = {"repository": result["repo_id"], "branch": result["revision"] or "main"}
    if result["dry_run"]:
        rows = [*facts.items(), ("visibility", visibility)]
        table("Would be uploaded: nothing was sent", ("", "this push"), rows)
    else:
        facts["visibility"] = "private" if result["private"] else "public"
        facts |= {"deleted there": ", ".join(result["deleted"])} if result["deleted"] else {}
        table("Uploaded", ("", "this push"), list(facts.items()))
    files = [(name, f"{size:,}") for name, size in result["files"].items()]
    table("Files", ("file", "bytes"), [*files, ("in all", f"{sum(result['files'].values()):,}")])
    if result["dry_run"]:
        write(f"To upload it:\n  {command}", sys.stdout)
        return
    write(f"{result['url']}\n{_use(result, report)}", sys.stdout)


def _use(result: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """Return one line that uses the model from the Hub."""
    repo, at = result["repo_id"], f', revision="{result["revision"]}"' if result["revision"] else ""
    if report["gguf"]:
        return f"ollama run hf.co/{repo}   or   llama-cli -hf {repo}"
    if report["what"] == "adapter":
        return f'model = PeftModel.from_pretrained(base, "{repo}"{at})   (the card loads the base that it belongs to)'
    return f'model = AutoModelForCausalLM.from_pretrained("{repo}"{at})'
