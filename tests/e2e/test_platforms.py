"""The run on a CPU and the plan on Windows and macOS, simulated: our modules see a system that lacks what those lack.

Libraries see the real one, so this says nothing about them. Grading processes are simulated as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SYSTEM = '''
"""Python imports a module of this name when it starts."""
import asyncio, builtins, ctypes, os, platform, resource, signal, subprocess, sys, types
from pathlib import Path

WINDOWS = os.environ["SIMULATED"] == "win32"
MISSING = {"fcntl", "resource", "termios", "pwd", "grp"} if WINDOWS else set()


def replaced(module, hidden="", **values):
    class Replaced(types.ModuleType):
        def __getattr__(self, name):
            if name in hidden.split():
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r} here")
            return getattr(module, name)

    copy = Replaced(module.__name__)
    vars(copy).update(values)
    return copy


def open_file(path, *arguments):
    if Path(path).is_dir():
        raise PermissionError(13, "Permission denied", path)
    return os.open(path, *arguments)


def fsync(handle):
    raise OSError(9, "Bad file descriptor")


def setrlimit(which, limits):
    if which == resource.RLIMIT_AS and limits[0] < 390 * 2**30:
        raise ValueError("current limit exceeds maximum limit")
    resource.setrlimit(which, limits)


def killpg(group, number):
    if Path(f"/proc/{group}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
        raise PermissionError(1, "Operation not permitted")
    os.killpg(group, number)


if WINDOWS:
    OTHERS = {
        "os": replaced(os, "killpg setsid getpgid getuid geteuid fork uname sysconf set_blocking register_at_fork",
                       name="nt", open=open_file),
        "signal": replaced(signal, "SIGKILL SIGHUP SIGALRM SIGUSR1 alarm setitimer pthread_kill"),
        "sys": replaced(sys, platform="win32"),
        "platform": replaced(platform, system=lambda: "Windows"),
        "ctypes": replaced(ctypes, "CDLL"),
    }

    def add_reader(*_):
        raise NotImplementedError

    start = subprocess.Popen.__init__

    def popen(self, *arguments, **options):
        assert not options.get("pass_fds"), "pass_fds not supported on Windows."
        start(self, *arguments, **options)

    asyncio.SelectorEventLoop.add_reader = add_reader
    subprocess.Popen.__init__ = popen
else:
    OTHERS = {
        "os": replaced(os, killpg=killpg),
        "sys": replaced(sys, platform="darwin"),
        "platform": replaced(platform, system=lambda: "Darwin"),
        "resource": replaced(resource, setrlimit=setrlimit),
        "ctypes": replaced(ctypes, "CDLL"),
    }
really_import = builtins.__import__


def import_(name, *arguments, **options):
    module = really_import(name, *arguments, **options)
    here = (arguments[0] if arguments else options.get("globals")) or {}
    if here.get("__name__", "").startswith("popo_lite") or "/popo_lite/" in str(here.get("__file__", "")):
        if name in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return OTHERS.get(name, module)
    return module


builtins.__import__ = import_
'''
OPTIONS = (
    "train.steps=2", "train.save_steps=1", "eval.problems=4", "data.prompts_per_step=2", "rollout.num_generations=4",
    "reward.functions=exact",  # asks a grading process, which `math` does only for algebra
)  # fmt: skip
COMMANDS = (
    ["train", "tiny_cpu", "--output", "run", "--view", "plain", *(w for o in OPTIONS for w in ("--set", o))],
    ["generate", "run", "What is 3 + 4?"],
    ["plan", "tiny_cpu"],
    ["plan", "qwen_7b_lora", "--vram", "24GiB"],
    ["recipe", "show", "r1_distill_7b_lora"],  # has characters that few encodings have
)
SCRIPT = """
import json, sys
from popo_lite.cli import main
for command in json.loads(sys.argv[1]):
    main(command, standalone_mode=False)
    print("done", command[0], flush=True)
"""


def simulate(system: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(SYSTEM)
    paths = [str(folder), str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"SIMULATED": system, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONIOENCODING": "cp1252"} if system == "win32" else {}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env={**os.environ, **environment},
                          capture_output=True, text=True, encoding="utf-8", timeout=300)  # fmt: skip


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_train_generate_and_plan(system, tmp_path):
    done = simulate(system, tmp_path, "-c", SCRIPT, json.dumps(COMMANDS))
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("done ")] == [f"done {c[0]}" for c in COMMANDS]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["peak_memory_bytes"] > 2**18  # macOS counts bytes, the machine below it KiB
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["platform"].split()[0] == {"win32": "Windows", "darwin": "Darwin"}[system]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]


GRADING = """
import sys
from pathlib import Path
from popo_lite.grading import Grader
from popo_lite.recipe import RewardRecipe
from popo_lite.types import Problem
problem = Problem(id="p", messages=({"role": "user", "content": "?"},), answer="0.5")
with Grader(RewardRecipe(functions="own:grade", timeout_seconds=2.0, workers=1)) as grader:
    rewards = grader.grade([(text, problem) for text in ("right", "hang", "right", "die", "wrong", "right")])
print(*(reward.outcome.value for reward in rewards))
"""


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_grading_survives_functions_that_hang_and_die(system, tmp_path):
    lines = ("import os, time", "def grade(text, problem):", "    print('noise')",
             "    time.sleep(1000) if text == 'hang' else os._exit(1) if text == 'die' else None",
             "    return text == 'right'")  # fmt: skip
    (tmp_path / "own.py").write_text("\n".join(lines))
    done = simulate(system, tmp_path, "-c", GRADING)
    assert done.stdout.split() == ["correct", "timeout", "correct", "error", "incorrect", "correct"], done.stderr


def test_a_sweep_is_refused_on_windows(tmp_path):
    done = simulate("win32", tmp_path, "-m", "popo_lite", "sweep", "tiny_components", "--dry-run")
    assert done.returncode == 2
    assert "sweeps do not run on Windows" in done.stderr
