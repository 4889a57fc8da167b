"""Write a bug report: what the doctor found, versions, settings and, of a run, what holds no prompt, answer or data."""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from popo_lite.errors import PopoError
from popo_lite.metrics import METRICS
from popo_lite.recipe_file import dump_recipe
from popo_lite.redaction import MASK, SHORTEST_SECRET, redact, without_home
from popo_lite.run_folder import RunFolder
from popo_lite.tools.doctor.packages import installed

VARIABLES = re.compile(
    r"CUDA_(VISIBLE_DEVICES|DEVICE_ORDER|HOME|PATH|LAUNCH_BLOCKING|MODULE_LOADING)|NVIDIA_VISIBLE_DEVICES|"
    r"NCCL_(DEBUG|P2P_DISABLE|CUMEM_ENABLE)|HF_(HOME|HUB_CACHE|HUB_OFFLINE|ENDPOINT|DATASETS_CACHE|DATASETS_OFFLINE)|"
    r"TRANSFORMERS_(CACHE|OFFLINE)|TORCH_(HOME|LOGS|COMPILE_DISABLE|CUDA_ARCH_LIST)|TORCHDYNAMO_DISABLE|"
    r"TORCHINDUCTOR_CACHE_DIR|PYTORCH_(CUDA_)?ALLOC_CONF|TRITON_CACHE_DIR|BNB_CUDA_VERSION|"
    r"VLLM_(ATTENTION_BACKEND|LOGGING_LEVEL|USE_V1|WORKER_MULTIPROC_METHOD|CPU_KVCACHE_SPACE)|"
    r"(OMP|MKL)_NUM_THREADS|PYTHON(PATH|HOME|HASHSEED|UTF8|OPTIMIZE|UNBUFFERED|IOENCODING)|"
    r"XDG_(CACHE|STATE|CONFIG)_HOME|CONDA_PREFIX|VIRTUAL_ENV|LC_(ALL|CTYPE)|CC|CXX|PATH|LD_LIBRARY_PATH|LD_PRELOAD|"
    r"TERM|LANG|COLUMNS|TMPDIR|(HTTPS?|ALL|NO)_PROXY",
    re.IGNORECASE,
)
"""Environment variables that change what a run does and hold no secret, apart from the logins of URLs."""
MASKED = re.compile(r"(CUDA|NVIDIA|NCCL|HF|HUGGINGFACE|TRANSFORMERS|TORCH\w*|PYTORCH|TRITON|VLLM|BNB|UNSLOTH|POPO)_\w+")
"""Others that may change it: that they are set is written, and not their values."""
METRIC_LINES, LOG_LINES = 20, 400
LOG_START = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ ([A-Z]+) ")
QUOTED = re.compile(r"\"[^\"]*\"|(?<!\w)'[^']*'(?!\w)")
"""A quotation in a line of the log; not an apostrophe."""
FRAME = re.compile(r'\s*File "[^"]+", line \d+')
OF_TRACEBACK = re.compile(
    rf"{FRAME.pattern}|\s*(Traceback \(most recent call last\):|During handling of the above exception|"
    r"The above exception was the direct cause)|\s+[~^]+$"
)
RAISED = re.compile(r"([\w.]*(?:Error|Exception|Exit|Interrupt)): .*")
"""An exception with its message, which may quote data."""
LEFT_OUT = "[left out]"


def write_bundle(path: Path, report: Mapping[str, Any], run: RunFolder | None) -> list[str]:
    """Write the bug report to a new zip file; return the names of the files in it."""
    versions = installed()
    files = {
        "doctor.json": json.dumps(report, indent=2),
        "packages.txt": "".join(f"{name}=={versions[name]}\n" for name in sorted(versions)),
        "variables.txt": "".join(f"{name}={value}\n" for name, value in sorted(variables().items())),
    }
    if run is not None:
        files |= {f"run/{name}": text for name, text in run_files(run).items()}
    token = _saved_token()
    with zipfile.ZipFile(path, "x", zipfile.ZIP_DEFLATED) as bundle:
        for name, text in files.items():
            shown = without_home(redact(text))
            bundle.writestr(name, shown.replace(token, MASK) if token else shown)
    return list(files)


def _saved_token() -> str | None:
    """Return the Hub's token if `hf auth login` saved one: it is in no environment variable."""
    from huggingface_hub import get_token

    token = get_token()
    return token if token and len(token) >= SHORTEST_SECRET else None


def variables() -> dict[str, str]:
    """Return the environment variables that change what a run does, masked unless they are known to be no secret."""
    known = {name: value for name, value in os.environ.items() if VARIABLES.fullmatch(name)}
    return {name: MASK for name in os.environ if MASKED.fullmatch(name)} | known


def run_files(run: RunFolder) -> dict[str, str]:
    """Return name -> text of a run's files for a bug report. A damaged file is replaced by what is wrong with it."""
    files = {}
    try:
        files["recipe.toml"] = public_recipe_text(run)
    except PopoError as error:
        files["recipe.toml"] = f"# {error.what}\n"
    if run.environment_path.is_file():
        try:
            content = json.loads(run.environment_path.read_text("utf-8"))
            files["environment.json"] = json.dumps(content, indent=2)
        except ValueError as error:
            files["environment.json"] = f"damaged: {type(error).__name__}\n"
    if run.log_path.is_file():
        lines = run.log_path.read_text("utf-8", "replace").split("\n")
        files["log.txt"] = "\n".join(without_quotations(lines)[-LOG_LINES:])
    if run.metrics_path.is_file():
        lines = run.metrics_path.read_text("utf-8", "replace").split("\n")
        files["metrics.jsonl"] = "".join(map(_figures, [line for line in lines if line][-METRIC_LINES:]))
    return files


def public_recipe_text(run: RunFolder) -> str:
    """Return the run's recipe as a model card shows it, and without its texts for the model."""
    from popo_lite.tools.public import public_recipe

    recipe = public_recipe(run.recipe())
    texts = {f"data.{name}": LEFT_OUT for name in ("system_prompt", "chat_template") if getattr(recipe.data, name)}
    return dump_recipe(recipe.with_values(texts))


def without_quotations(lines: Sequence[str]) -> list[str]:
    """Return the lines of a log without what they quote of problems and answers, and without messages of exceptions.

    Of the lines below a message, which may be rows of the data, only the places of tracebacks stay.
    """
    kept, follows_frame = list[str](), False
    for line in lines:
        if LOG_START.match(line):
            kept.append(QUOTED.sub(_short, RAISED.sub(rf"\1: {LEFT_OUT}", line)))
        elif not line.strip() or OF_TRACEBACK.match(line) or (follows_frame and line.startswith("    ")):
            kept.append(line)
        elif raised := RAISED.fullmatch(line):
            kept.append(f"{raised[1]}: {LEFT_OUT}")
        elif kept and not kept[-1].endswith(LEFT_OUT):
            kept.append(LEFT_OUT)
        follows_frame = FRAME.match(line) is not None  # then comes its line of code
    return kept


def _short(quoted: re.Match[str]) -> str:
    """Return a quotation if it is a name, such as a setting or a file, and not a text."""
    inner = quoted[0][1:-1]
    return (
        quoted[0]
        if len(inner) <= 40 and re.fullmatch(r"[\w./:=+-]*", inner)
        else quoted[0][0] + LEFT_OUT + quoted[0][0]
    )


def _figures(line: str) -> str:
    """Return a line of metrics.jsonl with its numbers, and why a step was skipped: other texts are of answers."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return f"{LEFT_OUT}: damaged\n"
    if not isinstance(record, dict):
        return f"{LEFT_OUT}: damaged\n"
    known = {name: value for name, value in record.items() if name in METRICS}
    kept = {
        name: _numbers(value) for name, value in known.items() if name == "skipped_reason" or not isinstance(value, str)
    }
    kept["skipped_reason"] = known.get("skipped_reason")
    return json.dumps(kept) + "\n"


def _numbers(value: Any) -> Any:
    """Return numbers, and the numbers of a table."""
    if isinstance(value, Mapping):
        return {name: _numbers(each) for name, each in value.items()}
    return (
        value
        if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))
        else LEFT_OUT
    )
