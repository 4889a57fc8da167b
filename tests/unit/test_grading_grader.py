"""Grading for real: worker processes that hang, die, print, eat memory, and are gone afterwards."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from popo_lite.errors import GradingError, UserInputError
from popo_lite.grading import Grader, refuse_ungraded, ungraded_ratio
from popo_lite.recipe import RewardRecipe
from popo_lite.types import Outcome, Problem, Reward

HANGS = r"\boxed{\binom{10^9}{10^8}}"  # math-verify computes it while it parses


def request(text: str, answer: str = "42", name: str = "p-7", **meta: object) -> tuple[str, Problem]:
    problem = Problem(id=name, messages=({"role": "user", "content": "How many?"},), answer=answer, meta=meta)
    return text, problem


def outcomes(rewards: list[Reward]) -> list[str]:
    return [reward.outcome.value for reward in rewards]


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


EARLIER: set[int] = set()
"""Processes that other tests of this process left, such as torch's compile workers."""


def children() -> set[int]:
    """Processes that this test started below this one, alive or not reaped, whatever session they are in."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return {pid for pid in pids if stat(pid)[1:2] == [str(os.getpid())]} - EARLIER


def running(pid: int) -> bool:
    """Whether `pid` is there and is not a zombie that its adoptive parent has yet to reap."""
    return stat(pid)[:1] not in ([], ["Z"])


def wait_until(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(autouse=True)
def no_process_is_left():
    EARLIER.update(children())
    yield
    assert not children()


@pytest.fixture
def function(tmp_path, monkeypatch):
    """Writes a module with the given body of `grade(text, problem)` into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(body: str) -> str:
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        source = f"import os, sys, time\ndef grade(text, problem):\n{lines}\n"
        (tmp_path / "my_rewards.py").write_text(source)
        return "my_rewards:grade"

    return write


def recipe(function: str = "math", **settings: object) -> RewardRecipe:
    return RewardRecipe(functions=function, **settings)


# --- mathematics ---


def test_plain_answers_need_no_process():
    with Grader(recipe()) as grader:
        rewards = grader.grade([request(r"\boxed{42}"), request(r"\boxed{41}"), request(r"\boxed{}")] * 50)
        assert outcomes(rewards) == ["correct", "incorrect", "unparsed"] * 50
        assert grader.grade([]) == []
        assert not children()


def test_answers_that_need_algebra_are_graded_by_workers():
    with Grader(recipe()) as grader:
        rewards = grader.grade(
            [
                request(r"\boxed{\frac12}", "0.5"),
                request(r"\boxed{\frac13}", "0.5"),
                request(r"\boxed{\{2, 1\}}", "1, 2"),
                request("She has 42 apples."),
                request("No idea."),
                request(r"\boxed{x}", "((((", name="broken"),
            ]
        )
        assert outcomes(rewards) == ["correct", "incorrect", "correct", "correct", "unparsed", "error"]
        assert [reward.answer for reward in rewards] == [r"\frac12", r"\frac13", r"\{2, 1\}", "42", None, "x"]
        assert "problem 'broken'" in rewards[-1].detail
        assert len(children()) == 2


def test_an_answer_that_hangs_times_out_and_the_next_is_graded():
    towers = [request(r"\boxed{9^{9^{9^9}}}"), request(r"\boxed{(10^9)!}")]  # too large to be right
    with Grader(recipe(workers=1, timeout_seconds=2.0)) as grader:
        grader.check()
        started = time.monotonic()
        rewards = grader.grade([*towers, request(HANGS), request(HANGS), request(r"\boxed{\frac{84}{2}}")])
        seconds = time.monotonic() - started
    assert outcomes(rewards) == ["incorrect", "incorrect", "timeout", "timeout", "correct"]
    assert [reward.value for reward in rewards] == [0, 0, 0, 0, 1]
    assert rewards[2].detail == "no verdict within reward.timeout_seconds = 2"
    assert rewards[2].answer == r"\binom{10^9}{10^8}"
    assert 4.0 <= seconds < 60.0  # starting a worker takes seconds on a busy machine


def test_oversized_latex_is_decided_at_once():
    latex = "+".join(rf"\frac{{1}}{{{i}}}" for i in range(2, 9000))
    deep = "{" * 5000 + "1" + "}" * 5000
    with Grader(recipe(max_answer_characters=200_000)) as grader:
        started = time.monotonic()
        assert outcomes(grader.grade([request(rf"\boxed{{{latex}}}"), request(rf"\boxed{{{deep}}}")])) == [
            "unparsed",
            "unparsed",
        ]
        assert time.monotonic() - started < 1.0


def test_only_the_end_of_an_answer_is_graded():
    with Grader(recipe(max_answer_characters=100)) as grader:
        near, far = request(r"\boxed{42}" + "." * 90), request(r"\boxed{42}" + "." * 91)
        assert outcomes(grader.grade([near, far])) == ["correct", "unparsed"]


@pytest.mark.parametrize("functions", ["math", ["exact"]])
def test_thinking_that_opens_or_closes_before_the_graded_end_is_noticed(functions):
    dots, answer = "." * 200 + "\n" * 100, "\\boxed{42}" if functions == "math" else "42"
    texts = [
        f"<think>{dots}{answer}",
        f"<think>{dots}</think>{answer}",
        f"<think></think>{dots}{answer}",
        f"{dots}{answer}",
    ]
    texts += [f"<think>{'.' * (97 - len(answer))}{answer}"]  # the tag is cut
    requests = [request(text) for text in texts]
    with Grader(recipe(functions, max_answer_characters=100, workers=1)) as grader:
        assert outcomes(grader.grade(requests)) == ["unparsed", *["correct"] * 3, "unparsed"]
    with Grader(recipe(functions, max_answer_characters=100, workers=1), thinking_open=True) as grader:
        assert outcomes(grader.grade(requests[:4])) == ["unparsed", "correct", "correct", "unparsed"]


# --- the user's functions ---


def test_what_a_function_may_return(function):
    name = function('return eval(text, {"nan": float("nan")})')
    texts = ["True", "False", "0.75", "None", "2.0", "nan", "'x'", "1/0"]
    with Grader(recipe(name)) as grader:
        rewards = grader.grade([request(text) for text in texts])
    assert outcomes(rewards) == ["correct", "incorrect", "correct", "unparsed", "error", "error", "error", "error"]
    assert [reward.value for reward in rewards] == [1, 0, 0.75, 0, 0, 0, 0, 0]
    assert [reward.detail.partition(";")[0] for reward in rewards[4:]] == [
        "the reward function returned 2.0, outside its range [0, 1]",
        "the reward function returned nan",
        "the reward function returned 'x'",
        "ZeroDivisionError: division by zero (my_rewards.py:3)",
    ]


def test_a_function_gets_text_and_problem(function):
    name = function(
        "want = {'id': 'p-7', 'question': 'How many?', 'messages': [{'role': 'user', 'content': 'How many?'}],\n"
        "        'answer': '42', 'meta': {'level': 3, 'tags': ['a']}}\n"
        "return text == 'é😀\\n\\ud800' and problem == want"
    )
    with Grader(recipe(name)) as grader:
        assert outcomes(grader.grade([request("é😀\n\ud800", level=3, tags=["a"])])) == ["correct"]


def test_the_box_of_an_answer_is_reported_for_any_function(function):
    with Grader(recipe(function("return len(text) > 12"))) as grader:
        assert [r.answer for r in grader.grade([request(r"\boxed{ 7 }"), request("a longer text")])] == ["7", None]


def test_a_meta_value_that_json_cannot_hold_is_an_error_of_that_problem(function):
    with Grader(recipe(function("return True"))) as grader:
        rewards = grader.grade([request("a"), request("b", name="odd", when=object()), request("c")])
    assert outcomes(rewards) == ["correct", "error", "correct"]
    assert "problem 'odd'" in rewards[1].detail
    with Grader(recipe()) as grader:  # which mathematics has no use for
        assert outcomes(grader.grade([request(r"\boxed{\frac{84}{2}}", when=object())])) == ["correct"]


def test_printing_and_reading_do_not_touch_the_protocol(function, capfd):
    name = function(
        "print('{\"ready\": true}')\n"
        "print('x' * 100_000)\n"
        "os.write(1, b'raw\\n')\n"
        "os.system('echo from a child')\n"
        "assert sys.stdin.read() == ''\n"
        "return True"
    )
    with Grader(recipe(name)) as grader:
        assert outcomes(grader.grade([request("a")] * 6)) == ["correct"] * 6
    assert capfd.readouterr() == ("", "")


def test_what_a_function_printed_is_in_the_detail_of_an_error(function):
    name = function(
        "print('grading', text)\n"
        "print('\\x1b[2Jwatch out', file=sys.stderr)\n"
        "if text == 'bad': raise ValueError('no such thing')\n"
        "if text == 'long': print('y' * 50_000); raise KeyError('k')\n"
        "return True"
    )
    with Grader(recipe(name, workers=1)) as grader:
        grader.check()
        (pid,) = children()
        good, bad, long, after = grader.grade([request(text) for text in ("good", "bad", "long", "after")])
        assert children() == {pid}  # an exception costs no process
    assert outcomes([good, bad, long, after]) == ["correct", "error", "error", "correct"]
    assert good.detail == ""
    assert bad.detail == ("ValueError: no such thing (my_rewards.py:5); the worker wrote:\ngrading bad\n [2Jwatch out")
    assert long.detail.startswith("KeyError: 'k' (my_rewards.py:6)")
    assert 4000 < len(long.detail) < 4300


def test_a_function_that_hangs_is_a_timeout_even_if_it_prints_all_the_time(function):
    name = function(
        "if text == 'sleep': time.sleep(1000)\n"
        "while text == 'print': print('z' * 1000)\n"
        "while text == 'spin': pass\n"
        "return True"
    )
    with Grader(recipe(name, timeout_seconds=1.0)) as grader:
        started = time.monotonic()
        rewards = grader.grade([request(text) for text in ("sleep", "a", "print", "b", "spin", "c")])
        assert time.monotonic() - started < 10
    assert outcomes(rewards) == ["timeout", "correct"] * 3


def test_a_worker_that_dies_once_is_retried(function, tmp_path):
    mark = tmp_path / "died"
    name = function(
        f"if not os.path.exists({str(mark)!r}):\n    open({str(mark)!r}, 'w').close(); os._exit(7)\nreturn True"
    )
    with Grader(recipe(name, workers=1)) as grader:
        assert outcomes(grader.grade([request("a"), request("b")])) == ["correct", "correct"]
    assert mark.exists()


def test_a_worker_that_dies_every_time_is_an_error_with_what_it_wrote(function):
    name = function(
        "if text == 'exit': print('last words'); os._exit(7)\n"
        "if text == 'segfault': import signal; os.kill(os.getpid(), signal.SIGSEGV)\n"
        "return True"
    )
    with Grader(recipe(name, workers=1)) as grader:
        rewards = grader.grade([request("exit"), request("a"), request("segfault"), request("b")])
    assert outcomes(rewards) == ["error", "correct", "error", "correct"]
    assert rewards[0].detail == (
        "grading this answer ended the worker twice (exit code 7); the worker wrote:\nlast words"
    )
    assert "(signal 11: Segmentation fault)" in rewards[2].detail


def test_exiting_is_an_error_and_not_the_end_of_the_worker(function):
    with Grader(recipe(function("sys.exit(3)"))) as grader:
        (reward,) = grader.grade([request("a")])
    assert reward.outcome is Outcome.ERROR
    assert reward.detail == "SystemExit: 3 (my_rewards.py:3)"


def test_a_memory_bomb_is_an_error_and_the_next_answer_gets_a_fresh_process(function):
    name = function("if text == 'bomb': return len(bytearray(8 * 2**30)) > 0\nreturn True")
    with Grader(recipe(name, workers=1)) as grader:
        grader.check()
        (pid,) = children()
        rewards = grader.grade([request("bomb"), request("a")])
        assert pid not in children()
    assert outcomes(rewards) == ["error", "correct"]
    assert rewards[0].detail == "MemoryError (my_rewards.py:3)"


def test_a_slow_import_is_not_charged_to_an_answer(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "slow_rewards.py").write_text("import time\ntime.sleep(1.5)\ndef grade(text, problem): return 1\n")
    with Grader(recipe("slow_rewards:grade", timeout_seconds=1.0)) as grader:
        assert outcomes(grader.grade([request("a")])) == ["correct"]


def test_large_requests_do_not_block_the_pipes(function):
    name = function("return len(text) == 1_000_000 and len(problem['meta']['m']) == 2_000_000")
    with Grader(recipe(name, max_answer_characters=1_000_000)) as grader:
        big = request("é" * 1_000_000, m="é" * 2_000_000)
        assert outcomes(grader.grade([big] * 3)) == ["correct"] * 3


def test_order_is_kept_over_many_mixed_requests(function):
    name = function(
        "if text == 'raise': raise ValueError(text)\n"
        "if text == 'die': os._exit(1)\n"
        "if text == 'hang': time.sleep(1000)\n"
        "time.sleep(int(text) % 3 / 1000)\n"
        "return int(text) / 1000"
    )
    special = {17: "die", 40: "hang", 41: "raise", 99: "hang", 150: "die", 199: "raise"}
    expected = {"die": "error", "hang": "timeout", "raise": "error"}
    with Grader(recipe(name, timeout_seconds=1.0)) as grader:
        rewards = grader.grade([request(special.get(i, str(i))) for i in range(200)])
    for i, reward in enumerate(rewards):
        if i in special:
            assert reward.outcome.value == expected[special[i]]
        else:
            assert (reward.value, reward.outcome) == (i / 1000, Outcome.INCORRECT)


# --- loading ---


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("nowhere:grade", "there is no module 'nowhere'"),
        ("my_rewards:grad", "has no attribute 'grad'"),
        ("my_rewards:os", "is not a callable object"),
    ],
)
def test_a_wrong_function_is_refused_at_the_start(function, name, fault):
    function("return True")
    with Grader(recipe(name)) as grader:
        for attempt in (grader.check, lambda: grader.grade([request("a")])):
            with pytest.raises(UserInputError) as caught:
                attempt()
            assert caught.value.exit_code == 2
            assert caught.value.where == "reward.functions"
            assert f'"{name}" cannot be used' in caught.value.what
            assert fault in caught.value.what
            assert caught.value.next_step
            assert not children()


def test_a_module_that_ends_the_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deadly.py").write_text("import os\nprint('bye')\nos._exit(9)\n")
    with Grader(recipe("deadly:grade")) as grader, pytest.raises(UserInputError) as caught:
        grader.check()
    assert "its worker ended while importing it (exit code 9); the worker wrote:\nbye" in caught.value.what


def test_a_module_that_never_finishes_importing_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("popo_lite.grading.grader.STARTUP_SECONDS", 1.0)
    (tmp_path / "endless.py").write_text("while True: pass\n")
    with Grader(recipe("endless:grade")) as grader, pytest.raises(UserInputError, match="more than 1 seconds"):
        grader.check()


def test_a_function_that_stops_loading_during_a_run_is_not_the_recipes_fault(function, tmp_path):
    name = function("os._exit(1)")
    with Grader(recipe(name, workers=1)) as grader:
        grader.check()
        (tmp_path / "my_rewards.py").write_text("import os\nos._exit(9)\n")
        with pytest.raises(GradingError, match="exit code 9"):
            grader.grade([request("a")])


def test_checking_once_is_enough_to_have_a_worker(function):
    with Grader(recipe(function("return os.getpid() > 0"))) as grader:
        grader.check()
        grader.check()
        before = children()
        assert len(before) == 1
        assert outcomes(grader.grade([request("a")])) == ["correct"]
        assert children() == before


def test_files_in_the_working_directory_do_not_replace_the_standard_library(function, tmp_path):
    for name in ("random.py", "json.py", "math.py", "types.py"):
        (tmp_path / name).write_text("raise RuntimeError('not the real one')\n")
    with Grader(recipe(function("import random; return random.random() >= 0"))) as grader:
        assert outcomes(grader.grade([request("a")])) == ["correct"]


def test_a_worker_has_one_thread_a_memory_cap_and_no_torch(function):
    name = function(
        "import json, resource\n"
        "facts = [os.environ['OMP_NUM_THREADS'], resource.getrlimit(resource.RLIMIT_AS)[0], 'torch' in sys.modules]\n"
        "raise ValueError(json.dumps(facts))"
    )
    with Grader(recipe(name)) as grader:
        (reward,) = grader.grade([request("a")])
    facts = reward.detail.removeprefix("ValueError: ").rpartition(" (")[0]
    assert json.loads(facts) == ["1", 4 * 2**30, False]


def test_a_mathematics_worker_does_not_map_torch():
    with Grader(recipe(workers=1)) as grader:
        grader.grade([request(r"\boxed{\frac{84}{2}}")])
        (pid,) = children()
        assert "torch" not in Path(f"/proc/{pid}/maps").read_text()


# --- processes and threads ---


def test_workers_outlive_the_thread_that_called(function):
    rewards = []
    with Grader(recipe(function("return True"), workers=1)) as grader:
        for _ in range(3):
            thread = threading.Thread(target=lambda: rewards.extend(grader.grade([request("a")])))
            thread.start()
            thread.join()
            assert len(children()) == 1
        (pid,) = children()
        time.sleep(0.2)
        assert running(pid)
        assert outcomes(grader.grade([request("a")])) == ["correct"]
        assert children() == {pid}
    assert outcomes(rewards) == ["correct"] * 3


def test_threads_may_grade_at_the_same_time(function):
    results: dict[int, list[float]] = {}
    with Grader(recipe(function("return int(text) / 1000"))) as grader:

        def work(base: int) -> None:
            results[base] = [reward.value for reward in grader.grade([request(str(base + i)) for i in range(30)])]

        threads = [threading.Thread(target=work, args=(base,)) for base in (0, 100, 200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {base: [(base + i) / 1000 for i in range(30)] for base in (0, 100, 200)}


def test_an_idle_worker_that_was_killed_is_replaced(function):
    with Grader(recipe(function("return True"), workers=1)) as grader:
        grader.check()
        (pid,) = children()
        os.kill(pid, signal.SIGKILL)
        assert outcomes(grader.grade([request("a")])) == ["correct"]


def test_an_interrupted_call_leaves_no_verdict_for_the_next(function, monkeypatch):
    name = function("time.sleep(0.3)\nreturn text == 'right'")
    with Grader(recipe(name, workers=1)) as grader:
        grader.check()
        main = threading.main_thread().ident
        threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            grader.grade([request("wrong")] * 5)
        assert not children()
        assert outcomes(grader.grade([request("right")])) == ["correct"]


def test_a_timeout_also_ends_what_the_function_started(function, tmp_path):
    note = tmp_path / "pid"
    name = function(
        f"import subprocess\nchild = subprocess.Popen(['sleep', '1000'])\n"
        f"open({str(note)!r}, 'w').write(str(child.pid))\nchild.wait()"
    )
    with Grader(recipe(name, timeout_seconds=1.0)) as grader:
        assert outcomes(grader.grade([request("a")])) == ["timeout"]
    pid = int(note.read_text())
    assert wait_until(lambda: not running(pid))


def test_closing_twice_is_fine_and_grading_afterwards_is_not(function):
    grader = Grader(recipe(function("return True")))
    grader.check()
    grader.close()
    grader.close()
    assert not children()
    with pytest.raises(RuntimeError):
        grader.grade([request("a")])


PARENT = """
import sys
from popo_lite.grading import Grader
from popo_lite.recipe import RewardRecipe
from popo_lite.types import Problem
grader = Grader(RewardRecipe(functions="stuck:grade", timeout_seconds=1000.0))
problem = Problem(id="p", messages=({"role": "user", "content": "q"},), answer="1")
grader.check()
print("up", flush=True)
for text in sys.stdin:
    grader.grade([(word, problem) for word in text.split()])
"""


def start_parent(tmp_path: Path, answers: str) -> tuple[subprocess.Popen, list[int]]:
    """A process that grades `answers`, and the ids of its workers."""
    (tmp_path / "stuck.py").write_text(
        "import os, pathlib, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "(here / f'{os.getpid()}.pid').touch()\n"
        "def grade(text, problem):\n"
        "    (here / f'{os.getpid()}.busy').touch()\n"
        "    time.sleep(1000) if text == 'sleep' else 9 ** 9 ** 9\n"
    )
    command = [sys.executable, "-c", PARENT]
    parent = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "up\n"
    parent.stdin.write(f"{answers}\n" if answers else "")
    parent.stdin.flush()
    assert wait_until(lambda: len(list(tmp_path.glob("*.busy"))) == len(answers.split()))
    workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert all(running(pid) for pid in workers)
    return parent, workers


@pytest.mark.parametrize("answers", ["", "sleep power"])  # the power keeps the interpreter lock for minutes
def test_no_worker_outlives_a_parent_that_was_killed(tmp_path, answers):
    parent, workers = start_parent(tmp_path, answers)
    assert len(workers) == (2 if answers else 1)
    with parent:
        parent.kill()
    assert wait_until(lambda: not any(running(pid) for pid in workers), seconds=3)


def test_no_worker_outlives_a_parent_that_forgot_to_close(tmp_path):
    parent, workers = start_parent(tmp_path, "")
    with parent:
        parent.stdin.close()
        assert parent.wait(timeout=10) == 0
    assert wait_until(lambda: not any(running(pid) for pid in workers), seconds=3)


# --- too few graded ---


def graded(correct: int, timeout: int, error: int) -> list[Reward]:
    return (
        [Reward(value=1.0, outcome=Outcome.CORRECT, positive=True)] * correct
        + [Reward(value=0.0, outcome=Outcome.TIMEOUT, detail="too slow")] * timeout
        + [Reward(value=0.0, outcome=Outcome.ERROR, detail=f"oops\n{'x' * 5000}")] * error
    )


def test_the_ungraded_share_counts_what_is_no_verdict():
    assert ungraded_ratio(graded(6, 1, 1)) == 0.25
    assert ungraded_ratio([Reward(value=0.0, outcome=Outcome.UNPARSED)]) == 0.0
    assert ungraded_ratio([]) == 0.0


def test_a_step_with_too_few_verdicts_is_refused():
    refuse_ungraded(graded(6, 1, 1), limit=0.25, where="step 3")
    refuse_ungraded([], limit=0.0, where="step 3")
    with pytest.raises(GradingError) as caught:
        refuse_ungraded(graded(6, 1, 2), limit=0.25, where="step 3")
    assert caught.value.where == "step 3"
    assert "3 of 9 answers could not be graded (6 correct, 1 timeout, 2 error)" in caught.value.what
    assert "too slow | oops" in caught.value.what
    assert len(caught.value.what) < 1000
    assert "reward.timeout_seconds" in caught.value.next_step
