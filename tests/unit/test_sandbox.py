"""Test that right code passes its tests, and that no code does harm or passes by a trick."""

import json
import os
import re
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
from popo_lite.grading.functions import load_functions
from popo_lite.grading.sandbox import check_python_tests, find_code, grade_python_tests, prepare_python_tests
from popo_lite.recipe import RewardRecipe
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
    "plain values": (
        "def f(x): return x + 1",
        "assert f(2) == 3\nassert f(-1.5) == -0.5\nassert f(True) is not 3",
    ),
    "a list of lines": (
        "def f(x): return x * 2",
        ["assert f(2) == 4", "assert f('a') == 'aa'", "assert f([]) == []"],
    ),
    "containers": (
        "def f(x): return {1: (x, {x}), b'k': frozenset([None]), 'c': 1j, 'n': float('inf'), 'b': 2 ** 20000}",
        "assert f('é') == {1: ('é', {'é'}), b'k': frozenset([None]), 'c': 1j, 'n': float('inf'), 'b': 2 ** 20000}",
    ),
    "subclasses": (
        "from collections import *\ndef f(x): return Counter(x), OrderedDict(a=1), namedtuple('P', 'x y')(1, 2)",
        "assert f('aab') == ({'a': 2, 'b': 1}, {'a': 1}, (1, 2))",
    ),
    "tolerance": (
        "import math\ndef area(r): return math.pi * r * r",
        "assert math.isclose(area(2), 12.566, rel_tol=1e-3)",
    ),
    "no comparison": ("def f(x): return x > 2", "assert f(3)\nassert not f(2)"),
    "HumanEval": (
        "def add(x, y): return x + y",
        "METADATA = {}\n\ndef check(candidate):\n    assert candidate(2, 3) == 5, 'sum'\n    for x in range(5):\n"
        "        assert candidate(x, y=1) == x + 1\n",
        {"entry_point": "add"},
    ),
    "LeetCode": (
        "class Solution:\n    def add(self, x, y): return x + y",
        "def check(candidate):\n    assert candidate(x=2, y=3) == 5",
        {"entry_point": "Solution().add"},
    ),
    "a name like a built-in": ("def sum(a, b): return a + b", "assert sum(1, 2) == 3"),
    "a class": (
        """
        class Stack:
            def __init__(self): self.items = []
            def push(self, x): self.items.append(x)
            def pop(self): return self.items.pop()
            def __len__(self): return len(self.items)
        """,
        "s = Stack()\ns.push(3)\nassert len(s) == 1 and s.items == [3]\nassert s.pop() == 3\n"
        "s.items = [1]\nassert s.pop() == 1",
    ),
    "methods with names of built-in ones": (
        """
        class Sets:
            def __init__(self): self.count, self.parents = 0, {}
            def find(self, x): return self.parents.get(x, x)
            def union(self, x, y): self.parents[x], self.count = self.find(y), self.count + 1
        """,
        "s = Sets()\ns.union(1, 2)\nassert s.find(1) == 2 and s.count == 1",
    ),
    "iterators": (
        "def f(n): yield from range(n)",
        "it = f(1)\nassert next(it) == 0\ntry:\n    next(it)\n    assert False\nexcept StopIteration:\n    pass\n"
        "assert next(it, 7) == 7\nassert list(zip(f(9), 'ab')) == [(0, 'a'), (1, 'b')]\n"
        "assert list(zip([5, 6], *[f(1)])) == [(5, 0)]",
    ),
    "objects as arguments": (
        """
        class P:
            def __init__(self, x): self.x = x
        def total(ps): return sum(p.x for p in ps)
        """,
        "assert total([P(1), P(2)]) == 3",
    ),
    "a generator": ("def f(n): yield from range(n)", "assert list(f(3)) == [0, 1, 2]\nassert next(f(1)) == 0"),
    "an object as text": (
        "from fractions import Fraction\ndef f(x): return Fraction(1, x)",
        "assert str(f(2)) == '1/2'\nassert f(2).denominator == 2",
    ),
    "in place": ("def f(x): x.sort()", "x = [2, 3, 1]\nf(x)\nassert x == [1, 2, 3]"),
    "an exception": (
        "def f(x): raise ValueError('no')",
        "try:\n    f(1)\nexcept ValueError as error:\n    assert 'no' in str(error)\nelse:\n    assert False",
    ),
    "a constant": ("ANSWER = [4, 2]", "assert ANSWER == [4, 2]"),
    "imports and threads": (
        """
        import ssl, sqlite3, hashlib, heapq, decimal, threading
        from typing import List
        from dataclasses import dataclass
        @dataclass
        class A:
            x: int
        def f(xs: List[int]):
            out = []
            thread = threading.Thread(target=out.extend, args=(xs,))
            thread.start()
            thread.join()
            return [A(x).x for x in heapq.nsmallest(2, out)]
        """,
        "assert f([3, 1, 2]) == [1, 2]",
    ),
    "printing": (
        """
        def f(x):
            print('debug')
            return x
        if __name__ == '__main__':
            print(f(input()))
        """,
        "assert f(1) == 1",
    ),
    "stdin": (
        "n = int(input())\nprint(*range(n))\nexit()",
        [{"input": "3\n", "output": "0 1 2"}, {"input": "0", "output": "\n"}],
    ),
    "a main thread of its own": (
        """
        import sys, threading
        sys.setrecursionlimit(10**6)
        threading.stack_size(2**26)
        def main():
            for line in sys.stdin:
                print(line.strip()[::-1], 'é')
        threading.Thread(target=main).start()
        """,
        [{"input": "ab\ncd", "output": "ba é \ndc é\n\n"}],
    ),
}


@needs_containment
@pytest.mark.parametrize("case", RIGHT.values(), ids=RIGHT)
def test_right_code_passes(case):
    reward = grade(*case)
    assert (reward.value, reward.outcome, reward.detail) == (1.0, Outcome.CORRECT, "")


@needs_containment
@pytest.mark.parametrize(
    ("code", "tests", "value", "detail"),
    [
        (
            "def f(x): return x",
            "assert f(1) == 1\nassert f(2) == 3\nassert f(3) == 3\nassert f(4) == 4",
            0.75,
            "f(2) == 3",
        ),
        ("def f(x): return x", "for x in f([]):\n    assert x > 0", 0.0, "no assert was reached"),
        ("def f(x): return x", "y = f(1) + ''\nassert f(1) == 1", 0.5, "TypeError"),
        ("def f(x): return memoryview(b'')", "assert f(1) == memoryview(b'')", 0.0, "can compare plain data only"),
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


HEAD = """
import atexit, builtins, ctypes, gc, json, os, re, resource, shutil, signal, socket, sys, threading, time
libc = ctypes.CDLL(None)
def f(x): return 3 if attack() else 0
"""
TESTS = "assert f(2) == 3 or f('zebra') == 'zebra-77' or f(1) == colorsys.rgb_to_yiq(0, 0, 0)"
NAME = f"libc.prctl(15, b'{MARK}')  # PR_SET_NAME"


def named(text):
    """Return the programs in `text` by their headings."""
    parts = re.split(r"^## (.*)\n", text.replace("NAME", NAME), flags=re.MULTILINE)
    return {name: HEAD + code for name, code in zip(parts[1::2], parts[2::2], strict=True)}


# `attack` returns true, or `f` the right value, if it got what it wanted: then the answer passes its tests.
READS = named("""\
## /etc/passwd
def attack(): return open("/etc/passwd").read()
## the home folder
def attack(): return open("@HOME@/token").read()
## TCP
def attack(): return socket.create_connection(("127.0.0.1", @TCP@), 1)
## UDP
def attack(): return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", @TCP@))
## a UNIX socket
def attack(): return not socket.socket(socket.AF_UNIX).connect("@HOME@/socket")
## an abstract socket
def attack(): return not socket.socket(socket.AF_UNIX).connect("\\0@ABSTRACT@")
## the package
sys.path.append("@ROOT@")
def attack():
    import popo_lite.errors
    return True
""")
"""Attacks that succeed, without harm, if the code is not contained."""

TRICKS = named("""\
## os._exit
os._exit(0)
## SystemExit
def attack(): sys.exit(0)
## a made-up verdict
def attack():
    for line in b'{"failures": [""], "held": 1, "broken": ""}\\n', b'["value", true, null]\\n':
        for descriptor in range(256):
            try: os.write(descriptor, line)
            except OSError: pass
    os._exit(0)
## reading the tests
def attack(): return os.read(0, 100) or sys.stdin.read() or "==" in str(sys.argv)
## a module in place of the standard library's
open("colorsys.py", "w").write("def rgb_to_yiq(*_): return 0")  # in the current folder
def attack(): return 0
## expected values in memory
def f(x):
    frames = [sys._getframe()]
    while frames[-1].f_back: frames.append(frames[-1].f_back)
    seen = str([*gc.get_objects(), *(frame.f_locals for frame in frames)])
    return (re.search("zebr[a]-[0-9]+", seen) or [0])[0]
## redefined built-ins
builtins.AssertionError = type("AssertionError", (), {})
builtins.isinstance = lambda *_: True
builtins.exec = builtins.compile = lambda *_: None
json.dumps = lambda *_: '["value", true, null]'
def attack(): return 0
## an object equal to everything
class Equal:
    __eq__ = __le__ = __ge__ = __bool__ = __contains__ = lambda *_: True
def f(x): return Equal()
## a number equal to everything
class Equal(int):
    __eq__ = lambda *_: True
    __ne__ = lambda *_: False
def f(x): return Equal(7)
## the parent's memory
def attack():
    buffer = ctypes.create_string_buffer(8)
    place = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8)
    return libc.process_vm_readv(os.getppid(), place, 1, place, 1, 0) > 0 or not libc.ptrace(16, os.getppid(), 0, 0)
## a daemon
NAME
def attack():
    if not os.fork():
        os.setsid()
        os.fork() or time.sleep(60)
        os._exit(0)
    os.wait()
## exit functions and threads
NAME
atexit.register(time.sleep, 60)
threading.Thread(target=time.sleep, args=(60,)).start()
raise SystemExit
""")
"""Attacks on the verdict, and processes that stay, which fail in any case."""

HARMFUL = named("""\
## fork bomb
NAME
def attack():
    while True:
        try: os.fork()
        except OSError: pass
## thread bomb
NAME
def attack():
    while True: threading.Thread(target=time.sleep, args=(60,)).start()
## infinite output
def attack():
    while True: os.write(1, bytes(10**6)); os.write(2, bytes(10**6))
## infinite loop
NAME
def attack():
    while True: pass
## memory bomb
def attack():
    blocks = []
    while len(blocks) < 100: blocks.append(bytearray(2**24))
    return True
## memory of IPC
def attack(): return libc.shmget(0, 2**20, 0o1600) >= 0
## huge file
def attack():
    with open("big", "wb") as file:
        for _ in range(64): file.write(bytes(2**20))
    return True
## many files
def attack():
    for number in range(5000): open(str(number), "w").close()
    return True
## environment
def attack():
    place, block = ctypes.c_void_p.in_dll(libc, "program_invocation_name").value, str(os.environ)
    for _ in range(11):  # the arguments of the command line, and behind them the variables
        block += str(ctypes.string_at(place))
        place += len(ctypes.string_at(place)) + 1
    return "sekret" in block
## DNS
def attack(): return socket.getaddrinfo("example.com", 80)
## writing outside
def attack():
    os.makedirs("@HOME@", exist_ok=True)
    open("@HOME@/token", "w").write("x")
## writing to the library
def attack(): return open(os.path.dirname(os.__file__) + "/popo_hostile.py", "w")
## killing the parent
def attack():
    for number in range(1, 65): os.kill(os.getppid(), number)
    time.sleep(0.2)
    return os.getppid() != 1
## killing everybody
def attack(): os.kill(-1, 9)
## killing by number
def attack(): return not os.kill(@PID@, 9)
## /proc
def attack(): return [open(f"/proc/{process}/{name}", "rb") for process in (1, "self") for name in ("environ", "mem")]
## ignored signals
NAME
def attack():
    for number in {*range(1, 32)} - {9, 19}: signal.signal(number, signal.SIG_IGN)
    while True: pass
## endless recursion
sys.setrecursionlimit(10**9)
def attack(): return attack()
## a result that is too deep
def f(x):
    for _ in range(10**5): x = [x]
    return x
## an endless result
def f(x):
    while True: yield 0
## a reply that is too deep
def attack(): [os.write(descriptor, b"[" * 60000 + b"\\n") for descriptor in range(3, 30) if os.isatty(descriptor) < 1]
## segmentation fault
def attack(): ctypes.string_at(0)
## slow regular expression
def attack(): return re.match("(a+)+b", "a" * 60)
## sleep
def attack(): time.sleep(60)
## a link in place of the folder
def attack():
    os.chdir("/")
    shutil.rmtree("/tmp", ignore_errors=True)
    os.symlink("@HOME@", "/tmp")
## deleting
def attack(): shutil.rmtree("@HOME@", ignore_errors=True)
## mount
def attack(): return not libc.mount(b"x", b"/tmp", b"proc", 0, None) or not libc.umount2(b"/lib", 2)
## chroot
def attack(): return not os.chroot(".")
## new namespaces
def attack(): return not libc.unshare(0x10000000)  # CLONE_NEWUSER
## becoming root
def attack():
    try: os.setuid(0)
    finally: return not libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[1 << 21] * 2))
## inherited descriptors
def attack():
    found = 0
    for descriptor in range(3, 64):
        try: found += bool(os.fstat(descriptor))
        except OSError: pass
    return found > 2  # the two through which it gets calls
## lowering the limits of the judge
def attack(): resource.prlimit(os.getppid(), resource.RLIMIT_AS, (4096, 4096))
## endless __del__
class Deleted:
    def __del__(self):
        while True: pass
def attack(): Deleted()
## an exception that hangs
class Hanging(Exception):
    def __str__(self):
        while True: pass
def attack(): raise Hanging
""")

PROGRAMS = named("""\
## infinite output
while True: os.write(1, b"3\\n" * 10**5)
## a child that keeps the output
NAME
if not os.fork(): os.setsid(); time.sleep(60)
## waiting for more input
print(2); input(); input()
## killing everybody
print(2); os.kill(-1, 9); os.kill(os.getppid(), 9)
## a made-up report
for descriptor in range(256):
    try: os.write(descriptor, b'{"outputs": ["3", "zebra-77"]}')
    except OSError: pass
## the expected output in memory
print(re.search("zebr[a]-[0-9]+", str(gc.get_objects()))[0])
""")


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


def hostile_processes(wait=True):
    """Return whether hostile processes are left, after a moment: the kernel ends those of a namespace one by one."""
    for _ in range(50 if wait else 1):
        names = (path.read_text() for path in Path("/proc").glob("[0-9]*/comm"))
        try:
            found = MARK in map(str.strip, names)
        except OSError:  # one ended while it was looked at
            continue
        if not found:
            return False
        time.sleep(0.02)
    return True


def attack(code, tests, seconds=1.0, **options):
    start = time.monotonic()
    reward = grade_python_tests(fenced(code), problem(tests), timeout_seconds=seconds, **options)
    assert time.monotonic() - start < seconds + 2
    for mistake in ("NameError", "SyntaxError", "AttributeError", "TypeError: "):  # it must have been an attack
        assert mistake not in reward.detail.replace("TypeError: tests can compare", "")
    return reward


@needs_containment
@pytest.mark.parametrize("name", [*READS, *TRICKS, *HARMFUL])
def test_attacks_fail_without_effect_and_in_time(name, outside):
    if name in ("memory of IPC", "new namespaces") and os.statvfs("/proc/sys/kernel").f_flag & os.ST_RDONLY:
        pytest.skip("these stay possible, within the namespaces, where /proc/sys is read-only")
    code = (READS | TRICKS | HARMFUL)[name]
    reward = attack(outside(code), "assert 3 in f(2)" if "yield" in code else TESTS)
    assert (reward.value, reward.outcome) == (0.0, Outcome.INCORRECT), reward.detail


@needs_containment
@pytest.mark.parametrize("code", PROGRAMS.values(), ids=PROGRAMS)
def test_attacks_by_programs_fail(code, outside):
    assert attack(code, [{"input": "1\n", "output": "3"}, {"input": "", "output": "zebra-77"}]).value == 0.0


@needs_containment
@pytest.mark.parametrize("name", [*READS, *TRICKS])
def test_without_containment_some_attacks_succeed_but_none_on_the_verdict(name, outside, monkeypatch):
    monkeypatch.setattr(sandbox, "uncontained_reason", lambda: "not tried")
    reward = attack(outside((READS | TRICKS)[name]), TESTS, seconds=2.0, allow_uncontained=True)
    assert reward.value == (name in READS)


@needs_containment
def test_nothing_remains_of_a_worker_that_is_killed():
    code = HARMFUL["infinite loop"]
    script = f"from popo_lite.grading.sandbox import *\ngrade_python_tests({fenced(code)!r}, {problem(TESTS)!r})"
    worker = subprocess.Popen([sys.executable, "-c", script])
    while not hostile_processes(wait=False):
        assert worker.poll() is None
        time.sleep(0.05)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert not hostile_processes()


@pytest.mark.parametrize(
    ("tests", "meta", "reason"),
    [
        ("assert f(1) ==", {}, "not Python"),
        ("f(1)", {}, "no assert"),
        ("", {}, "no assert"),
        ("assert 1 == 1", {}, "no name of the answer"),
        ("def check(candidate):\n    assert candidate(1) == 1", {}, "no name of the answer"),
        ("def test_f():\n    assert f(1) == 1", {}, "nothing calls"),
        ("import pytest\nassert f(1) == 1", {}, "import pytest"),
        ("from solution import f\nassert f(1) == 1", {}, "import solution"),
        ('[{"input": "1"}]', {}, '"input" and "output"'),
        ('[{"input": "1", "output": ["1"]}]', {}, '"input" and "output"'),
        ('["assert f(1) == 1", 3]', {}, '"input" and "output"'),
        # An answer that defines these gets right whatever it wants.
        ("assert isclose(f(1), 0.5)", {}, "import f, isclose"),
        ("assert isclose(f(1), 0.5)", {"entry_point": "f"}, "import isclose"),
        ("assert np.allclose(f(1), [0.5])", {"entry_point": "f"}, "import np"),
        ("assert isclose(Solution().f(1), 0.5)", {}, "import isclose"),
        ("assert Counter(f(1)) == Counter([1])", {}, "import Counter"),
        ("assert decode(encode('a')) == 'a'", {}, "import decode, encode"),
        ("assert decode(encode('a')) == 'a'", {"entry_point": ["encode", "decode"]}, ""),
        ("from math import isclose\nassert isclose(f(1), 0.5)", {}, ""),
        ("def check(candidate):\n    assert candidate(1) == 1", {"entry_point": "f"}, ""),
        ("assert total([Pair(1, 2)]) == 3", {}, ""),
        # Values of which the answer decides what they are equal to.
        ("assert solve(Node(3)).val == Node(9).val", {}, "define Node"),
        ("assert solve(3) == Node(9)", {}, "define Node"),
        ("assert solve(3) == EXPECTED", {}, "define EXPECTED"),
        ("class Case: want = Node(9)\nassert solve(3) == Case.want.val", {}, "define Node"),
        ("want = Node(9)\nassert want.val == solve(3)", {}, "define Node"),
        ("want = []\nwant.append(Node(9).val)\nassert [solve(3)] == want", {}, "define Node"),
        ("for x, want in [(3, Node(9))]:\n    assert solve(x) == want.val", {}, "define Node"),
        ("def make(x): return Node(x)\nassert solve(3) == make(9).val", {}, "define Node"),
        ("def same(a, b): assert a == b\nsame(solve(3), Node(9).val)", {}, "define Node"),
        ("import math\nassert math.isclose(solve(3), Node(9).val)", {}, "define Node"),
        ("assert abs(solve(3) - Node(9).val) < 1e-6", {}, "define Node"),
        ("def check(f):\n    assert f(3) == Node(9).val", {"entry_point": "solve"}, "define Node"),
        ("assert solve(Node(3)).val == Node(9).val", {"entry_point": ["solve", "Node"]}, ""),
        ("root = Node(3)\ninsert(root, 5)\nassert root.right.val == 5 and root.val == 3", {}, ""),
        ("def f(node): return [node.val]\nassert f(solve(Node(3))) == [9]", {}, ""),
        ("cases = [(Node(3), 9)]\nfor node, want in cases:\n    assert solve(node) == want", {}, ""),
        ("def check(f):\n    for x, y in zip(f(Node(1)), [2]):\n        assert x == y", {"entry_point": "solve"}, ""),
        ("r = solve([1, 3])\nassert r == sorted(r) and len(r) == len(set(r)) == 2", {}, ""),
        ("s = Stack()\ns.push(1)\nassert s.pop() == 1 and len(s) == len(s.items)", {}, ""),
        ('[{"input": "1", "output": "2"}]', {}, ""),
    ],
)
def test_tests_that_cannot_be_read_are_refused_with_a_reason(tests, meta, reason):
    found = check_python_tests(problem(tests, **meta)) or ""
    assert reason in found if reason else not found
    if reason:
        with pytest.raises(ValueError, match=reason[:9]):
            grade_python_tests("f = print", problem(tests, **meta), allow_uncontained=True)


@needs_containment
def test_what_tests_make_objects_of_cannot_give_the_value_to_compare_with():
    code = "def Point(x, y): return 0\ndef f(x): return 0"
    assert grade(code, "assert len({f(1), Point(1, 2)}) == 1").value == 0.0
    assert grade("EXPECTED = 0\ndef f(x): return 0", "assert len({f(1), EXPECTED}) == 1").value == 0.0


OBJECT = "class Object:\n    {} = lambda *_: True\ndef f(x): return Object()"
ENDLESS = "def f(x):\n    n = 0\n    while True:\n        yield n\n        n += 1"


@needs_containment
@pytest.mark.parametrize(
    ("code", "tests"),
    [
        (OBJECT.format("startswith"), "assert f('abc').startswith('cb')"),
        (OBJECT.format("isdigit"), "assert f(7).isdigit()"),
        (OBJECT.format("issubset"), "assert f(7).issubset({1, 2})"),
        (OBJECT.format("equals"), "assert f(7).equals([1, 2])"),
        (OBJECT.format("count"), "assert f(7).count(1) == 1"),
        (OBJECT.format("is_integer").replace("Object()", "[Object()]"), "assert f(7)[0].is_integer()"),
        (OBJECT.format("__contains__"), "assert 5 in f(3)"),
        (OBJECT.format("__lt__ = __eq__"), "assert f(3).__lt__(4)"),
        (OBJECT.format("__lt__ = __eq__"), "assert f(3) < 4"),
        (OBJECT.format("__and__"), "assert f(3).__and__({4})"),
        (
            OBJECT.format("startswith") + "\nclass Solution:\n    f = staticmethod(f)",
            "assert Solution().f(1).startswith('b')",
        ),
        (ENDLESS, "assert 5 in f(3)"),
    ],
)
def test_an_object_does_not_answer_for_the_value_that_a_test_expects(code, tests):
    reward = grade(code, tests)
    assert reward.value == 0.0
    assert "can compare plain data only" in reward.detail or "not supported between" in reward.detail


@needs_containment
@pytest.mark.parametrize(
    "tests",
    [
        "assert f(0) == 0\nassert all(map(lambda c: f(c[0]) == c[1], [(1, 2)]))",
        "assert f(0) == 0\nassert all(a == b for a, b in zip(map(f, [1]), [2]))",
        "it = iter([1])\nassert f(0) == 0 and not list(filter(lambda x: f(x) != 2, it))",
    ],
)
@pytest.mark.parametrize("error", ["StopIteration", "GeneratorExit", "type('StopIteration', (StopIteration,), {})"])
def test_an_exception_does_not_end_a_loop_of_the_tests(tests, error):
    reward = grade(f"def f(x):\n    if x: raise {error}\n    return 0", tests)
    assert reward.value == 0.0
    assert "Error: " in reward.detail


@needs_containment
@pytest.mark.parametrize(
    ("tests", "meta"),
    [
        ("assert f(0) == []\nassert all(a == b for a, b in zip(f(2), [0, 1]))", {}),
        ("assert f(0) == []\nresult = f(2)\nfor a, b in zip([0, 1], result):\n    assert a == b", {}),
        (
            "def check(g):\n    assert g(0) == []\n    for i, (a, b) in enumerate(zip(g(2), (0, 1))):\n"
            "        assert (i, a) == (b, b)",
            {"entry_point": "f"},
        ),
    ],
)
def test_too_few_results_fail_in_a_zip_with_the_expected_ones(tests, meta):
    for few in ("[]", "iter([])", "[0]"):
        reward = grade(f"def f(x): return {few} if x else []", tests, meta)
        assert reward.value == 0.0
        assert "fewer values than expected" in reward.detail
    assert grade("def f(x): return list(range(x))", tests, meta).value == 1.0
    assert grade("def f(x): return iter(range(9)) if x else []", tests, meta).value == 1.0


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na = 1\n```\nthen\n```python\nb = 2\n```\nprints\n```\n2\n```", "b = 2\n"),
        ("```\na = 1\n```\n```bash\nls\n```", "a = 1\n"),
        ("```python\na = 1\n```\n```py\nb = 2\n```", "b = 2\n"),
        ("```python title=x\na = 1\n```\n```not a fence```", "a = 1\n"),
        ("```x\n" * 4000, None),
        ("1. So:\n   ```py\n   if a:\n       b\n   ```", "if a:\n    b\n"),
        ("def f(x):\n    return x", "def f(x):\n    return x"),
        ("```python\ncut = 'off", None),
        ("I do not know.", None),
        ("```bash\nls\n```", None),
        ("(" * 20000, None),
        ("", None),
    ],
)
def test_the_last_block_of_python_is_the_code(text, code):
    assert find_code(text) == code
    if code is None:
        reward = grade_python_tests(text, problem("assert f(1) == 1"), allow_uncontained=True)
        assert (reward.value, reward.outcome) == (0.0, Outcome.UNPARSED)


@needs_containment
@pytest.mark.parametrize(
    ("text", "options", "outcome"),
    [
        ("<think>\nRIGHT", {}, Outcome.UNPARSED),
        ("RIGHT", {"opened": True}, Outcome.UNPARSED),
        ("<think>RIGHT</think>I do not know.", {}, Outcome.UNPARSED),
        ("<think>RIGHT</think>WRONG", {}, Outcome.INCORRECT),
        ("WRONG</think>RIGHT", {"opened": True}, Outcome.CORRECT),
        ("[T]RIGHT", {"tags": ("[T]", "[/T]")}, Outcome.UNPARSED),
        ("[T]WRONG[/T]RIGHT", {"tags": ("[T]", "[/T]")}, Outcome.CORRECT),
    ],
)
def test_code_in_the_thinking_does_not_count(text, options, outcome):
    text = text.replace("RIGHT", fenced("def f(x): return x")).replace("WRONG", fenced("def f(x): return 0"))
    reward = RewardRecipe(functions=["python_tests"], thinking_tags=options.get("tags", ("<think>", "</think>")))
    [function] = load_functions(reward, thinking_open=options.get("opened", False))
    assert function.grade(text, problem("assert f(1) == 1")).outcome == outcome


@pytest.fixture
def forgotten():
    """Forget the result of the trial, before and after the test."""
    sandbox.uncontained_reason.cache_clear()
    yield
    sandbox.uncontained_reason.cache_clear()


def refusal(**options):
    with pytest.raises(UserInputError) as caught:
        grade_python_tests("f = print", problem("assert f(1) == 1"), **options)
    assert caught.value.where == "reward.functions"
    return caught.value


def test_a_kernel_that_cannot_contain_is_refused_unless_the_user_allows_it(forgotten, monkeypatch):
    start = sandbox.START.replace("sandbox_runner.main()", "sandbox_runner.NAMESPACES = -1; sandbox_runner.main()")
    monkeypatch.setattr(sandbox, "START", start)
    error = refusal()
    assert "unshare: Invalid argument" in error.what
    assert "allow_uncontained = true" in error.next_step
    prepare_python_tests(allow_uncontained=True)
    assert grade("def f(x): return x", "assert f(1) == 1", allow_uncontained=True).value == 1.0


@needs_containment
def test_a_sandbox_that_leaks_is_refused(forgotten, monkeypatch):
    start = sandbox.START.replace("sandbox_runner.main()", "sandbox_runner.MAX_PROCESSES = 999; sandbox_runner.main()")
    monkeypatch.setattr(sandbox, "START", start)
    assert "'processes limited': False" in refusal().what


def test_other_systems_are_refused(forgotten, monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    assert "needs Linux" in refusal().what
    monkeypatch.delattr(sandbox.os, "fork")
    assert "allow_uncontained" not in refusal(allow_uncontained=True).next_step
