"""Grade code by tests, in a sandbox: `python_tests`. See `sandbox_runner` for what happens inside."""

from __future__ import annotations

import ast
import builtins
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from popo_lite.errors import UserInputError
from popo_lite.types import Outcome, Reward

FOLDER = str(Path(__file__).parent)
# Imported, not run as a file, so that its compiled form is kept. The folder comes last: it has a `math`, too.
START = f"import sys; sys.path.append({FOLDER!r}); import sandbox_runner; sys.path.pop(); sandbox_runner.main()"
GRACE_SECONDS = 1.0  # for starting the sandbox, and for tests that do not end although the code did
COUNTER, ZIP = "_popo_lite_count_assert", "_popo_lite_zip"
LIBRARIES = ("collections", "copy", "datetime", "decimal", "fractions", "functools", "itertools", "math", "operator")
"""Modules whose names tests often use without an import, because the reference solution has it."""

_SETUP = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign,
    ast.AugAssign,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Tests:
    """Tests of a problem: pairs of stdin and stdout, or statements that call the answer's `names`."""

    pairs: tuple[tuple[str, str], ...] = ()
    names: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    """Those of the names that only make objects for the tests."""
    modules: tuple[str, ...] = ()
    statements: tuple[str, ...] = ()
    shown: tuple[str | None, ...] = ()
    """For every statement its source if it is a test, or None if it only prepares one."""


def grade_python_tests(
    text: str,
    problem: Mapping[str, Any],
    *,
    timeout_seconds: float = 3.0,
    memory_mib: int = 512,
    partial: bool = False,
    allow_uncontained: bool = False,
) -> Reward:
    """Run the code of `text` against the tests in `problem["answer"]`; 1 if all pass, else 0.

    With `partial`, the value is the fraction of tests that pass. `timeout_seconds` is for all tests together,
    `memory_mib` for each process. Raises UserInputError if the code cannot be contained and `allow_uncontained` is
    false, ValueError if the tests cannot be read, and OSError if the sandbox cannot be started.
    """
    prepare_python_tests(allow_uncontained=allow_uncontained)
    tests = _tests_of(problem)
    code = find_code(text)
    if code is None:
        return Reward(value=0.0, outcome=Outcome.UNPARSED)
    job: dict[str, Any] = {"code": code}
    if tests.pairs:
        job["inputs"] = [given for given, _ in tests.pairs]  # what is expected stays here
    else:
        job |= _statements_job(tests)
    report = _run(job, uncontained_reason() is None, timeout_seconds, memory_mib)
    passed, detail = _judge_outputs(report, tests) if tests.pairs else _judge_statements(report, tests)
    value = sum(passed) / len(passed) if passed and (partial or all(passed)) else 0.0
    outcome = Outcome.CORRECT if value == 1 else Outcome.INCORRECT
    return Reward(value=value, outcome=outcome, answer=code, detail=detail)


def check_python_tests(problem: Mapping[str, Any], **_: object) -> str | None:
    """Return why the tests in `problem["answer"]` cannot be read, or None."""
    try:
        _tests_of(problem)
    except ValueError as error:
        return str(error)
    return None


def prepare_python_tests(*, allow_uncontained: bool = False, **_: object) -> dict[str, Any]:
    """Raise UserInputError if code of a model cannot be contained here, unless the user allows that."""
    reason = None if allow_uncontained and hasattr(os, "fork") else uncontained_reason()
    if reason is None:
        return {}
    allow = ""
    if hasattr(os, "fork"):
        allow = (
            '; or, on a machine that holds nothing of value, set reward.functions = [{name = "python_tests", '
            "allow_uncontained = true}]"
        )
    raise UserInputError(
        f'"python_tests" cannot contain the code that the model writes: {reason}',
        where="reward.functions",
        next_step=f"allow user namespaces (docs/rewards.md says how){allow}",
    )


def find_code(text: str) -> str | None:
    """Return the last fenced block of Python, else the last without a language, else the text if it is Python."""
    blocks: dict[str, str] = {}
    opened, lines = None, list[str]()
    for line in text.split("\n"):
        fence = line.strip()
        if opened is not None and fence == "```":
            blocks["python" if opened in ("py", "python3") else opened] = textwrap.dedent("\n".join([*lines, ""]))
            opened, lines = None, []
        elif opened is not None:
            lines.append(line)
        elif fence.startswith("```") and "`" not in fence[3:]:
            opened = fence[3:].strip().partition(" ")[0].lower()
    for language in ("python", ""):
        if blocks.get(language, "").strip():
            return blocks[language]
    try:
        return text if ast.parse(text).body and not blocks else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _statements_job(tests: _Tests) -> dict[str, Any]:
    kinds = {"names": tests.names, "classes": tests.classes, "modules": tests.modules}
    return {**kinds, "statements": tests.statements, "counter": COUNTER, "zip": ZIP}


def _judge_outputs(report: dict[str, Any] | None, tests: _Tests) -> tuple[list[bool], str]:
    """Return, for every pair, whether the program printed what is expected; and a message about the first failure."""
    outputs: list[str | None] = report["outputs"] if report else [None] * len(tests.pairs)
    passed = [
        output is not None and _lines(output) == _lines(expected)
        for output, (_, expected) in zip(outputs, tests.pairs, strict=True)
    ]
    if all(passed):
        return passed, ""
    first = passed.index(False)
    what = "failed or took too long" if outputs[first] is None else f"printed {outputs[first]!r:.80}"
    return passed, f"on input {first + 1} of {len(passed)} the program {what}"


def _judge_statements(report: dict[str, Any] | None, tests: _Tests) -> tuple[list[bool], str]:
    """Return for every test if it passed, statements that prepare tests included if they fail, and the first error."""
    if report is None:
        return [], "the tests were killed, or did not end in time"
    if report["broken"]:
        return [], f"running the code: {report['broken']}"
    if not report["held"]:  # a loop over an empty result checks nothing
        return [], next(filter(None, report["failures"]), "no assert was reached")
    results = list(zip(report["failures"], tests.shown, strict=True))
    failed = next((f"{shown or 'before the tests'}: {failure}" for failure, shown in results if failure), "")
    return [not failure for failure, shown in results if shown or failure], failed


def _lines(text: str) -> list[str]:
    """Return the lines of `text` without white space at their ends and empty lines at the end of the text."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _tests_of(problem: Mapping[str, Any]) -> _Tests:
    named = problem["meta"].get("entry_point") or ()
    return _read_tests(problem["answer"], (named,) if isinstance(named, str) else tuple(map(str, named)))


@lru_cache(maxsize=1024)  # all answers to a problem in a row
def _read_tests(source: str, entry_points: tuple[str, ...]) -> _Tests:
    """Read tests. Raises ValueError with the reason if they are no tests."""
    if source.lstrip().startswith("["):
        try:
            items = json.loads(source)
        except ValueError:
            items = []
        if items and all(isinstance(item, str) for item in items):
            source = "\n".join(items)
        elif items:
            texts = [(item.get("input"), item.get("output")) for item in items if isinstance(item, dict)]
            if len(texts) < len(items) or not all(isinstance(text, str) for pair in texts for text in pair):
                raise ValueError(
                    'the tests cannot be read: a JSON list holds strings, or objects with "input" and "output"'
                )
            return _Tests(pairs=tuple((str(given), str(expected)) for given, expected in texts))
    try:
        tree = ast.parse(source)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"the tests are not Python: {error}") from error
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    if len(entry_points) == 1 and "check" in defined - _loaded(tree):  # as in HumanEval
        tree.body += ast.parse(f"check({entry_points[0]})").body
    if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
        raise ValueError("the tests have no assert")
    names, modules = _free_names(tree, set(entry_points))
    tested = _tested(names, set(entry_points))
    origins = _Origins(tree, names, names - tested)
    origins.check()
    guard = _GuardTests(origins)
    statements, shown = list[str](), list[str | None]()
    for node in tree.body:
        prepares = isinstance(node, _SETUP) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        shown.append(None if prepares else textwrap.shorten(ast.unparse(node), 100))
        guarded = guard.visit(node)
        statements.append("\n".join(map(ast.unparse, guarded if isinstance(guarded, list) else [guarded])))
    if not any(shown):
        raise ValueError("the tests are defined, but nothing calls them")
    return _Tests(
        names=tuple(sorted(names)),
        classes=tuple(sorted(names - tested)),
        modules=tuple(sorted(modules)),
        statements=tuple(statements),
        shown=tuple(shown),
    )


class _GuardTests(ast.NodeTransformer):
    """Change tests so that they do not pass if they check nothing.

    The counter is called after every assert. A `zip` of values of the answer and others becomes `zip_all`.
    """

    def __init__(self, origins: _Origins) -> None:
        self._origins = origins

    def visit_Call(self, node: ast.Call) -> ast.Call:
        if isinstance(node.func, ast.Name) and node.func.id == "zip":
            own = [bool(self._origins.of(one)) for one in node.args]
            starred = any(isinstance(one, ast.Starred) for one in node.args)
            if any(own) and not all(own) and not starred and not self._origins.of(node.func):
                node.func.id = ZIP
                node.args.insert(0, ast.Tuple([ast.Constant(one) for one in own]))
        self.generic_visit(node)
        return node

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        self.generic_visit(node)
        return [node, *ast.parse(f"{COUNTER}()").body]


def _loaded(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _free_names(tree: ast.Module, entry_points: set[str]) -> tuple[set[str], set[str]]:
    """Return the names that the tests take from the answer, and the modules that they use without an import."""
    loaded, bound = _loaded(tree), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            roots = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for root in (root.partition(".")[0] for root in roots):
                if root not in sys.stdlib_module_names:
                    raise ValueError(f"the tests import {root or 'a relative module'}, and only Python's own are there")
    standard = loaded & set(dir(builtins))
    names = loaded - bound - standard
    modules = {
        node.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    } & names & sys.stdlib_module_names  # fmt: skip
    names = (names - modules) | (entry_points & loaded)
    if not names and len(standard - bound) == 1:
        names = standard - bound  # a task may ask for a function `sum`, and then the tests use no other name
    if not names:
        raise ValueError("the tests use no name of the answer")
    return names, modules


def _tested(names: set[str], entry_points: set[str]) -> set[str]:
    """Return which of `names` are tested, and not classes whose objects the tests need.

    Anything that helps to test must not come from the answer, which could define an `isclose` that is always true.
    Raises ValueError if that is not clear.
    """
    if len(names) == 1:
        return names
    tested = names & (entry_points | {"Solution"})
    functions = {name for name in names if not name[0].isupper()} - tested
    if not tested and len(functions) == 1:
        tested, functions = functions, set()
    libraries = {name for module in LIBRARIES for name in dir(import_module(module))}
    if helpers := functions | (names - tested) & libraries:
        raise ValueError(
            f"the tests neither define nor import {', '.join(sorted(helpers))}, and an answer could define that to its "
            "advantage; add it to the tests, or name all functions that are tested in the column entry_point"
        )
    return tested


class _Origins:
    """Find which names of the answer the values in the tests are made with.

    The answer decides what a value is that is made with a helper, its class `Node` for instance. As the expected side
    of a comparison such a value would equal whatever the answer wants.
    """

    def __init__(self, tree: ast.Module, names: set[str], helpers: set[str]) -> None:
        self._nodes, self._helpers = list(ast.walk(tree)), helpers
        self._known = {name: {name} for name in names}
        self._functions = {node.name: node.args for node in self._nodes if isinstance(node, ast.FunctionDef)}
        self._values = {
            node.targets[0].id: node.value
            for node in self._nodes
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        before = -1
        while before != (before := sum(map(len, self._known.values()))):  # in any order of statements
            for node in self._nodes:
                self._follow(node)

    def check(self) -> None:
        """Raise ValueError with the reason if the tests compare the answer to a value made with a helper."""
        for node in self._nodes:
            origins = list(filter(None, map(self.of, self._sides(node))))
            if len(origins) > 1 and (found := set[str]().union(*origins) & self._helpers):
                raise ValueError(
                    f"the tests compare values of the answer in {textwrap.shorten(ast.unparse(node), 80)!r}, and an "
                    f"answer could define {', '.join(sorted(found))} so that they are always equal; write down the "
                    "expected value, define the helper in the tests, or name it in the column entry_point"
                )

    def of(self, node: ast.AST) -> set[str]:
        """Return the names of the answer that the value of `node` is made with."""
        return set[str]().union(*(self._known.get(name, ()) for name in _loaded(node)))

    def _sides(self, node: ast.AST) -> list[ast.expr]:
        """Return what is compared by `node`, which may be a call as of `isclose`."""
        if isinstance(node, ast.Compare):
            return [node.left, *node.comparators]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
            return [node.left, node.right]
        if isinstance(node, ast.Call):
            own = isinstance(node.func, ast.Name) and node.func.id in self._functions
            return _arguments(node) if own or not self.of(node.func) else []
        return []

    def _follow(self, node: ast.AST) -> None:
        """Add the origins of the values that `node` gives to names."""
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, self._columns(node.value))
        elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value:
            self._bind(node.target, [self.of(node.value)])
        elif isinstance(node, ast.For | ast.comprehension):
            self._bind(node.target, self._items(node.iter))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            self._bind(ast.Name(node.name), [self.of(node)])
        elif isinstance(node, ast.Call):
            given = [self.of(one) for one in _arguments(node)]
            if isinstance(node.func, ast.Attribute) and self._values.keys() & _loaded(node.func.value):
                self._bind(node.func.value, given)  # as `expected` in `expected.append(Node(1))`
            elif isinstance(node.func, ast.Name) and (own := self._functions.get(node.func.id)):
                for parameter in (*own.posonlyargs, *own.args, *own.kwonlyargs):
                    self._bind(ast.Name(parameter.arg), given)

    def _bind(self, target: ast.expr, origins: list[set[str]]) -> None:
        """Give origins to the names in `target`; to each of its elements its own if there are as many."""
        if isinstance(target, ast.Tuple | ast.List) and len(target.elts) == len(origins):
            for one, its in zip(target.elts, origins, strict=True):
                self._bind(one, [its])
        else:
            for name in (node.id for node in ast.walk(target) if isinstance(node, ast.Name)):
                self._known[name] = self._known.get(name, set()).union(*origins)

    def _columns(self, value: ast.expr) -> list[set[str]]:
        return list(map(self.of, value.elts if isinstance(value, ast.Tuple | ast.List) else [value]))

    def _items(self, iterable: ast.expr) -> list[set[str]]:
        """Return the origins of the items of `iterable`, by column if its source shows columns."""
        if isinstance(iterable, ast.Name):
            iterable = self._values.get(iterable.id, iterable)
        if isinstance(iterable, ast.Call) and isinstance(iterable.func, ast.Name):
            if iterable.func.id == "zip":
                return list(map(self.of, iterable.args))
            if iterable.func.id == "enumerate":
                return [set(), self.of(iterable)]
        if isinstance(iterable, ast.Tuple | ast.List):
            rows = list(map(self._columns, iterable.elts))
            if len(set(map(len, rows))) == 1:
                return [set[str]().union(*column) for column in zip(*rows, strict=True)]
        return [self.of(iterable)]


def _arguments(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def _run(job: dict[str, Any], contained: bool, timeout_seconds: float, memory_mib: int) -> dict[str, Any] | None:
    """Run a job in a new sandbox; return its report, or None if it had to be killed.

    Raises OSError with the reason if the sandbox cannot be started.
    """
    options = {
        "contained": contained,
        "programs": "inputs" in job,
        "timeout_seconds": timeout_seconds,
        "memory_bytes": memory_mib * 2**20,
    }
    # Tokens and paths stay here. The same order of sets gives the same verdict.
    environment = {"PYTHONHASHSEED": "0"} | {key: os.environ[key] for key in os.environ if key == "LD_LIBRARY_PATH"}
    with nullcontext("/") if contained else tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            done = subprocess.run(
                # Without site-packages: what is installed is not the model's to use, and slow to look for.
                [sys.executable, "-s", "-P", "-S", "-X", "utf8", "-c", START, json.dumps(options)],
                input=json.dumps(job).encode(),
                capture_output=True,
                cwd=folder,
                env=environment,
                timeout=timeout_seconds + GRACE_SECONDS,
            )
        except subprocess.TimeoutExpired:  # which has killed the launcher; the kernel then kills the others
            return None
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        raise OSError(f"the sandbox cannot be started: {reason}")
    return json.loads(done.stdout) if done.stdout else None


@lru_cache(maxsize=1)
def uncontained_reason() -> str | None:
    """Return why this system cannot contain code, or None: try it once."""
    if sys.platform != "linux":
        return "this needs Linux (on Windows, WSL2)"
    code = """
import errno, os, socket, threading, time
def inside():
    network = socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect_ex(("192.0.2.1", 9))  # sends nothing
    threading.Thread(target=int).start()
    children = 0
    try:
        while children < 100:
            os.fork() or time.sleep(60)
            children += 1
    except OSError:
        pass
    return {
        "processes hidden": os.getpid() < 9,
        "files hidden": not os.path.exists("/etc"),
        "no network": network == errno.ENETUNREACH,
        "processes limited": 0 < children < 100,
    }
"""
    tests = "found = inside()\nassert len(found) == 4 and all(found.values()), found"
    read = _read_tests(tests, ("inside",))
    job = {"code": code, **_statements_job(read)}
    try:
        report = _run(job, contained=True, timeout_seconds=10.0, memory_mib=512)
    except OSError as error:
        return str(error)
    _, detail = _judge_statements(report, read)
    return f"a trial escaped: {detail}" if detail else None
