"""The process that checks run in: the name of a check per line of its input, its findings as lines of JSON."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import warnings

from popo_lite.errors import PopoError
from popo_lite.redaction import redact
from popo_lite.tools.doctor.findings import CHECKS, REPORT, Finding


def main() -> None:
    """Run checks until the input ends. A line without a finding says that a check is done."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print, some of them past Python
    faulthandler.enable()
    warnings.simplefilter("ignore")
    for name in iter(sys.stdin.readline, ""):
        check = next(check for check in CHECKS if check.name == name.strip())
        start = time.perf_counter()
        try:
            for finding in check.load()():
                print(json.dumps(finding.as_json()), file=answers, flush=True)
        except Exception as error:
            import traceback

            what, next_step = f"{type(error).__name__}: {_first_line(error)}", REPORT
            if isinstance(error, PopoError):
                what, next_step = error.what, error.next_step or REPORT
            facts = {"stderr": redact(traceback.format_exc()).splitlines()[-30:]}
            failed = Finding(name=check.name, status="failed", what=redact(what), next_step=next_step, facts=facts)
            print(json.dumps(failed.as_json()), file=answers, flush=True)
        print(json.dumps({"done": time.perf_counter() - start}), file=answers, flush=True)
    answers.close()
    os._exit(0)  # an engine that was half started may keep Python from ending


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")


if __name__ == "__main__":
    main()
