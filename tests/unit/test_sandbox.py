"""Code against tests: what passes, and that nothing which a model may write does any harm or passes by a trick."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from popo_lite.errors import UserInputError
from popo_lite.grading import sandbox
from popo_lite.grading.sandbox import check_python_tests, find_code, grade_python_tests, prepare_python_tests
from popo_lite.types import Outcome

MARK = "popo-hostile"  # the name that hostile processes give themselves
needs_containment = pytest.mark.usefixtures("contained")


@pytest.fixture(scope="module")
def contained():
    if reason := sandbox.uncontained_reason():
        pytest.skip(f"code cannot be contained here: {reason}")


def problem(tests, **meta):
    return {"id": "p", "question": "q", "answer": tests if isinstance(tests, str) else json.dumps(tests), "meta": meta}


def fenced(code):
    return f"Here it is.\n```python\n{textwrap.dedent(code)}\n```\nIt works."


def grade(code, tests, meta=None, **options):
    return grade_python_tests(fenced(code), problem(tests, **meta or {}), **{"timeout_seconds": 5.0} | options)


RIGHT = {
    "plain values": ("def f(x):\n    return x + 1", "assert f(2) == 3\nassert f(-1.5) == -0.5\nassert f(True) is not 3"),
    "a list of lines": ("def f(x):\n    return x * 2", ["assert f(2) == 4", "assert f('a') == 'aa'", "assert f([]) == []"]),
    "containers": (
        "def f(x):\n    return {1: (x, {x}), b'k': frozenset([None]), 'c': 1j, 'n': float('inf'), 'b': 2 ** 20000}",
        "assert f('é') == {1: ('é', {'é'}), b'k': frozenset([None]), 'c': 1j, 'n': float('inf'), 'b': 2 ** 20000}",
    ),
    "subclasses": (
        "from collections import *\ndef f(x):\n    return Counter(x), OrderedDict(a=1), namedtuple('P', 'x y')(1, 2)",
        "assert f('aab') == ({'a': 2, 'b': 1}, {'a': 1}, (1, 2))",
    ),
    "tolerance": ("import math\ndef area(r):\n    return math.pi * r * r", "assert math.isclose(area(2), 12.566, rel_tol=1e-3)"),
    "no comparison": ("def f(x):\n    return x > 2", "assert f(3)\nassert not f(2)"),
    "HumanEval": (
        "def add(x, y):\n    return x + y",
        "METADATA = {}\n\ndef check(candidate):\n    assert candidate(2, 3) == 5, 'sum'\n    for x in range(5):\n"
        "        assert candidate(x, y=1) == x + 1\n",
        {"entry_point": "add"},
    ),
    "a name like a built-in": ("def sum(a, b):\n    return a + b", "assert sum(1, 2) == 3"),
    "a class": (
        "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
        "    def pop(self): return self.items.pop()\n    def __len__(self): return len(self.items)",
        "s = Stack()\ns.push(3)\nassert len(s) == 1 and s.items == [3]\nassert s.pop() == 3\ns.items = [1]\nassert s.pop() == 1",
    ),
    "objects as arguments": (
        "class P:\n    def __init__(self, x): self.x = x\ndef total(ps):\n    return sum(p.x for p in ps)",
        "assert total([P(1), P(2)]) == 3",
    ),
    "a generator": ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2]\nassert next(f(1)) == 0"),
    "in place": ("def f(x):\n    x.sort()", "x = [2, 3, 1]\nf(x)\nassert x == [1, 2, 3]"),
    "an exception": (
        "def f(x):\n    raise ValueError('no')",
        "try:\n    f(1)\nexcept ValueError as error:\n    assert 'no' in str(error)\nelse:\n    assert False",
    ),
    "a constant": ("ANSWER = [4, 2]", "assert ANSWER == [4, 2]"),
    "imports and threads": (
        "import ssl, sqlite3, hashlib, heapq, decimal, threading\nfrom typing import List\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int\ndef f(xs: List[int]):\n    out = []\n    t = threading.Thread(target=out.extend, args=(xs,))\n"
        "    t.start(); t.join()\n    return [A(x).x for x in heapq.nsmallest(2, out)]",
        "assert f([3, 1, 2]) == [1, 2]",
    ),
    "printing": ("def f(x):\n    print('debug')\n    return x\nif __name__ == '__main__':\n    print(f(input()))", "assert f(1) == 1"),
    "stdin": ("n = int(input())\nprint(*range(n))\nexit()", [{"input": "3\n", "output": "0 1 2"}, {"input": "0", "output": "\n"}]),
    "a main thread of its own": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**26)\n"
        "def main():\n    for line in sys.stdin:\n        print(line.strip()[::-1], 'é')\nthreading.Thread(target=main).start()",
        [{"input": "ab\ncd", "output": "ba é \ndc é\n\n"}],
    ),
}  # fmt: skip


@needs_containment
@pytest.mark.parametrize("case", RIGHT.values(), ids=RIGHT)
def test_right_code_passes(case):
    reward = grade(*case)
    assert (reward.value, reward.outcome, reward.detail) == (1.0, Outcome.CORRECT, "")


@needs_containment
@pytest.mark.parametrize(
    ("code", "tests", "value", "detail"),
    [
        ("def f(x): return x", "assert f(1) == 1\nassert f(2) == 3\nassert f(3) == 3\nassert f(4) == 4", 0.75, "f(2) == 3"),
        ("def f(x): return x", "for x in f([]):\n    assert x > 0", 0.0, "no assert was reached"),
        ("def f(x): return x", "y = f(1) + ''\nassert f(1) == 1", 0.5, "TypeError"),
        ("def g(x): return x", "assert f(1) == 1", 0.0, "'f' is not defined"),
        ("def f(x): return x\nassert f(1) == 2", "assert f(1) == 1", 0.0, "running the code: AssertionError"),
        ("def f(x: return x", "assert f(1) == 1", 0.0, "SyntaxError"),
        ("print(input())", [{"input": "a", "output": "a"}, {"input": "b", "output": "c"}], 0.5, "printed 'b"),
        ("print(1); 1 / 0", [{"input": "", "output": "1"}], 0.0, "failed"),
    ],
)
def test_wrong_code_fails_with_a_reason_and_partly_if_asked(code, tests, value, detail):
    reward = grade(code, tests, partial=True)
    assert reward.value == value
    assert detail in reward.detail
    assert grade(code, tests).value == 0.0


# Each has a function `attack`, which returns true if it got what it wanted: then `f` gives the right result.
SOLVE = "\ndef f(x):\n    return 3 if attack() else 0\n"
TESTS = "assert f(2) == 3"
LOOP = "\n    while True: pass"
NAME = f"import ctypes; ctypes.CDLL(None).prctl(15, b'{MARK}')\n"
LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
READS = {
    "/etc/passwd": "def attack(): return open('/etc/passwd').read()",
    "the home folder": "def attack(): return open('@HOME@/token').read()",
    "TCP": "import socket\ndef attack(): return socket.create_connection(('127.0.0.1', @TCP@), 1)",
    "UDP": "import socket\ndef attack(): return socket.socket(2, 2).sendto(b'x', ('127.0.0.1', @TCP@))",
    "a UNIX socket": "import socket\ndef attack(): return not socket.socket(1).connect('@HOME@/socket')",
    "an abstract socket": "import socket\ndef attack(): return not socket.socket(1).connect('\\0@ABSTRACT@')",
    "importing popo_lite": "import sys\nsys.path.append('@ROOT@')\nimport popo_lite\ndef attack(): return True",
}
"""Attacks that succeed, without harm, if the code is not contained."""
ATTACKS = {
    "fork bomb": f"{NAME}import os\ndef attack():\n    while True:\n        try: os.fork()\n        except OSError: pass",
    "thread bomb": f"{NAME}import threading, time\ndef attack():\n    while True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "infinite output": "import os\ndef attack():\n    while True: os.write(1, b'x' * 10**6); os.write(2, b'x' * 10**6)",
    "infinite loop": f"{NAME}def attack():{LOOP}",
    "memory bomb": "def attack():\n    x = []\n    while len(x) < 1000: x.append(bytearray(2**20 * 8))\n    return True",
    "memory of IPC": f"{LIBC}def attack(): return libc.shmget(0, 2**20, 0o1600) >= 0",
    "huge file": "def attack():\n    with open('big', 'wb') as f:\n        for _ in range(64): f.write(bytes(2**20))\n    return True",
    "many files": "def attack():\n    for i in range(5000): open(str(i), 'w').close()\n    return True",
    "environment": (
        f"{LIBC}ctypes.pythonapi.Py_GetArgcArgv\ndef attack():\n    block = (ctypes.c_char_p * 9).in_dll(libc, 'environ')\n"
        "    return 'sekret' in str(os.environ) or b'sekret' in ctypes.string_at(ctypes.cast(block, ctypes.POINTER(ctypes.c_char_p))[0], 200)"
    ),
    "DNS": "import socket\ndef attack(): return socket.getaddrinfo('example.com', 80)",
    "writing outside": "import os\ndef attack():\n    os.makedirs('@HOME@', exist_ok=True)\n    open('@HOME@/token', 'w').write('x')",
    "writing to the library": "import os\ndef attack(): return open(os.path.dirname(os.__file__) + '/popo_hostile.py', 'w')",
    "killing the parent": f"import os, time\ndef attack():\n    for s in range(1, 65): os.kill(os.getppid(), s)\n    time.sleep(.2)\n    return not os.getppid()",
    "killing everybody": "import os\ndef attack():\n    os.kill(-1, 9)",
    "killing by number": "import os\ndef attack():\n    os.kill(@PID@, 9); return True",
    "ptrace": f"{LIBC}def attack(): return not libc.ptrace(16, os.getppid(), 0, 0)",
    "reading the parent's memory": (
        f"{LIBC}def attack():\n    v = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.create_string_buffer(8)), 8)\n"
        "    return libc.process_vm_readv(os.getppid(), v, 1, v, 1, 0) > 0"
    ),
    "/proc": "import os\ndef attack():\n    return [open(f'/proc/{p}/{n}', 'rb') for p in (1, os.getppid(), 'self') for n in ('environ', 'mem')]",
    "ignored signals": f"{NAME}import signal\ndef attack():\n    for s in {{*range(1, 32)}} - {{9, 19}}: signal.signal(s, signal.SIG_IGN){LOOP}",
    "a daemon": f"{NAME}import os, time\ndef attack():\n    if not os.fork():\n        os.setsid()\n        os.fork() or time.sleep(60)\n        os._exit(0)\n    os.wait()",
    "atexit and threads": f"{NAME}import atexit, threading, time\natexit.register(time.sleep, 60)\nthreading.Thread(target=time.sleep, args=(60,)).start()\nraise SystemExit",
    "os._exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\ndef attack(): sys.exit(0)",
    "a made-up verdict": (
        "import os\ndef attack():\n    for line in (b'{\"failures\": [\"\"], \"held\": 1, \"broken\": \"\"}\\n', b'[\"value\", true, null]\\n'):\n"
        "        for fd in range(256):\n            try: os.write(fd, line)\n            except OSError: pass\n    os._exit(0)"
    ),
    "reading the tests": "import os, sys\ndef attack(): return os.read(0, 100) or sys.stdin.read() or '==' in str(sys.argv)",
    "expected values in memory": (
        "import gc, sys\ndef attack():\n    frames = [sys._getframe()]\n    while frames[-1].f_back: frames.append(frames[-1].f_back)\n"
        "    return any('f(2) ' + '== 3' in str(x) for x in [*gc.get_objects(), *(v for f in frames for v in f.f_locals.values())] if type(x) in (str, list, dict, tuple))"
    ),
    "redefined built-ins": (
        "import builtins, json\nbuiltins.AssertionError = type('A', (), {})\nbuiltins.isinstance = lambda *a: True\nbuiltins.exec = lambda *a: None\n"
        "json.dumps = lambda *a: '[\"value\", true, null]'\n__builtins__ = {}\ndef attack(): return 0"
    ),
    "equal to everything": "class E:\n    __eq__ = __le__ = __ge__ = __bool__ = __contains__ = lambda *a: True\ndef f(x): return E()",
    "a number equal to everything": "class E(int):\n    __eq__ = lambda *a: True\n    __ne__ = lambda *a: False\ndef f(x): return E(7)",
    "endless recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef attack(): return attack()",
    "a result that is too deep": "def f(x):\n    for _ in range(10**5): x = [x]\n    return x",
    "a result without end": "def f(x):\n    while True: yield 0",
    "a reply too deep to read": "import os\ndef attack(): [os.write(fd, b'[' * 10**6 + b'\\n') for fd in range(3, 30) if not os.set_blocking(fd, True)]",
    "segmentation fault": "import ctypes\ndef attack(): ctypes.string_at(0)",
    "slow regular expression": "import re\ndef attack(): return re.match('(a+)+b', 'a' * 60)",
    "sleep": "import time\ndef attack(): time.sleep(60)",
    "a link in place of the folder": "import os, shutil\ndef attack():\n    os.chdir('/')\n    shutil.rmtree('/tmp', True)\n    os.symlink('@HOME@', '/tmp')",
    "deleting": "import shutil\ndef attack(): shutil.rmtree('@HOME@', ignore_errors=True)",
    "mount": f"{LIBC}def attack(): return not libc.mount(b'x', b'/tmp', b'proc', 0, None) or not libc.umount2(b'/lib', 2)",
    "chroot": "import os\ndef attack():\n    os.chroot('.'); return True",
    "new namespaces": f"{LIBC}def attack(): return not libc.unshare(0x10000000)",
    "setuid": "import os\ndef attack():\n    os.setuid(0); return os.getuid() == 0",
    "inherited descriptors": "import os\ndef attack():\n    return [fd for fd in range(3, 64) if os.path.exists(f'/proc/self/fd/{fd}') or seen(fd)][2:]\ndef seen(fd):\n    try: return os.fstat(fd)\n    except OSError: return None",
    "lowering the judge's limits": "import resource, os, time\ndef attack():\n    resource.prlimit(os.getppid(), resource.RLIMIT_AS, (4096, 4096))",
    "endless __del__": f"class D:\n    def __del__(self):{LOOP.replace('    ', '        ')}\ndef attack(): D()",
    "an exception that hangs": "class E(Exception):\n    def __str__(self):\n        while True: pass\ndef attack(): raise E",
} | READS  # fmt: skip
PROGRAMS = {
    "infinite output": "import os\nwhile True: os.write(1, b'3\\n' * 10**5)",
    "a child that keeps the output": f"{NAME}import os, time\nif not os.fork(): os.setsid(); time.sleep(60)",
    "waiting for more input": "print(2); input(); input()",
    "killing everybody": "import os\nprint(2); os.kill(-1, 9); os.kill(os.getppid(), 9)",
    "a made-up report": "import os\nfor fd in range(256):\n    try: os.write(fd, b'{\"outputs\": [\"3\"]}')\n    except OSError: pass",
    "the expected output in memory": "import gc\nprint(3 if any('expect' in str(x) for x in gc.get_objects() if type(x) in (list, dict)) else 2)",
}  # fmt: skip


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Things that no attack may reach: a home folder, a token, sockets and a process of the same user."""
    (tmp_path / "token").write_text("sekret")
    tmp_path.chmod(0o755)
    monkeypatch.setenv("HF_TOKEN", "sekret")
    victim = subprocess.Popen(["sleep", "60"])
    abstract = f"popo-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(1) as unix, socket.socket(1) as hidden:
        unix.bind(str(tmp_path / "socket"))
        unix.listen()
        hidden.bind(f"\0{abstract}")
        hidden.listen()
        values = {"HOME": tmp_path, "TCP": tcp.getsockname()[1], "ABSTRACT": abstract, "PID": victim.pid}
        values["ROOT"] = Path(sandbox.__file__).parents[2]

        def fill(code):
            for name, value in values.items():
                code = code.replace(f"@{name}@", str(value))
            return code

        yield fill
    still_there = victim.poll() is None
    victim.kill()
    victim.wait()
    assert still_there
    assert (tmp_path / "token").read_text() == "sekret"
    assert {path.name for path in tmp_path.iterdir()} == {"token", "socket"}
    assert not (Path(os.__file__).parent / "popo_hostile.py").exists()
    assert not hostile_processes()


def hostile_processes():
    """Return the processes left over, after a moment: the kernel ends those of a namespace one by one."""
    for _ in range(50):
        names = (path.read_text() for path in Path("/proc").glob("[0-9]*/comm"))
        try:
            found = MARK in map(str.strip, names)
        except OSError:  # one ended while it was looked at
            continue
        if not found:
            return False
        time.sleep(0.02)
    return True


@needs_containment
@pytest.mark.parametrize("code", ATTACKS.values(), ids=ATTACKS)
def test_attacks_fail_without_effect_and_in_time(code, outside):
    start = time.monotonic()
    tests = "assert 3 in f(2)" if "yield" in code else TESTS
    reward = grade(outside(code + ("" if "def f" in code else SOLVE)), tests, timeout_seconds=1.0)
    assert time.monotonic() - start < 3
    assert (reward.value, reward.outcome) == (0.0, Outcome.INCORRECT), reward.detail
    assert "NameError" not in reward.detail and "SyntaxError" not in reward.detail  # it must have been an attack


@needs_containment
@pytest.mark.parametrize("code", PROGRAMS.values(), ids=PROGRAMS)
def test_attacks_by_programs_fail(code, outside):
    start = time.monotonic()
    assert grade(code, [{"input": "1\n", "output": "3"}], timeout_seconds=1.0).value == 0.0
    assert time.monotonic() - start < 3


@needs_containment
@pytest.mark.parametrize("code", READS.values(), ids=READS)
def test_those_attacks_succeed_without_containment(code, outside, monkeypatch):
    monkeypatch.setattr(sandbox, "uncontained_reason", lambda: "not tried")
    assert grade(outside(code + SOLVE), TESTS, allow_uncontained=True).value == 1.0
