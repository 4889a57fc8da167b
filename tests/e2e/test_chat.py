"""`popo-lite chat` on a tiny run: on a terminal, from a pipe, and against transformers' own generate."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from operator import attrgetter

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from popo_lite.cli import main
from popo_lite.errors import PopoError
from popo_lite.policy.load import TINY_FOLDER
from popo_lite.recipe_file import dump_recipe
from popo_lite.run_folder import RunFolder
from popo_lite.tasks.rendering import Renderer
from popo_lite.tools.chat.command import _take
from popo_lite.tools.chat.model import open_chat, open_subject
from popo_lite.tools.chat.pieces import Pieces
from popo_lite.tools.chat.session import Session
from popo_lite.tools.console.chat import ChatScreen
from runs import finished_run

QUESTION = "What is 3 + 4?"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("chat") / "run", "model.quantization=none", noise=0.1).path


@pytest.fixture
def chat(run):
    """The command in this process: its lines are those of standard input."""

    def ask(*lines, options=(), model=run, code=0):
        arguments = ["chat", str(model), "--temperature", "0", *options]
        done = CliRunner().invoke(main, arguments, input="\n".join(lines))
        assert done.exit_code == code, done.output
        return done

    return ask


@pytest.fixture(scope="module")
def model(run):
    subject = open_subject(str(run), None, None)
    with open_chat(subject, None, compare=False, trust=False, source=str(run)) as model:
        yield model


@pytest.fixture
def session(model):
    yield Session(model, ChatScreen(plain=True, silent=True), temperature=0, max_tokens=None, seed=0, compare=True)
    model.forget()
    model.renderer.system_prompt = None


def answers(done):
    return [json.loads(line) for line in done.stdout.splitlines()]


def expected(messages, adapter):
    """Transformers' and PEFT's own greedy answer."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER)
    model = AutoModelForCausalLM.from_pretrained(TINY_FOLDER, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("weights", ["policy", "siamese"])
def test_answers_are_those_of_base_and_trained_weights(chat, run, weights):
    folder = run / ("adapter" if weights == "policy" else "siamese")
    found = answers(chat(QUESTION, options=["--json", "--compare", "--weights", weights]))
    messages = [{"role": "user", "content": QUESTION}]
    assert [one["weights"] for one in found] == ["base", weights]
    assert [one["text"] for one in found] == [expected(messages, None), expected(messages, folder)]
    assert found[0]["text"] != found[1]["text"]


def test_later_turns_go_on_from_earlier_ones(chat, run):
    second = "What is 10 + 5?"
    first, then = answers(chat(QUESTION, second, options=["--json", "--system-prompt", "Answer."]))
    messages = [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": second},
    ]
    assert then["text"] == expected(messages, run / "adapter")


def test_a_kept_cache_changes_nothing(session):
    texts = []
    for keep in (True, False):
        session.turns.clear()
        session.model.forget()
        for message in (QUESTION, "What is 10 + 5?", "And 8 + 8?"):
            session.say(message)
            if keep:
                assert set(session.model._caches) == {False, True}
            else:
                session.model.forget()
        texts.append([turn.answers[side].text for turn in session.turns for side in (False, True)])
    assert texts[0] == texts[1]


def test_lines_are_messages_and_only_answers_are_printed(chat):
    first, second = (one["text"] for one in answers(chat(QUESTION, "And?", options=["--json"])))
    done = chat(QUESTION, "", "And?", "/undo", " /undo")
    assert done.stdout.startswith(f"{first}\n{second}\n")
    assert "forgot: And?" in done.stderr
    assert chat(QUESTION, "/quit", "And?").stdout == f"{first}\n"
    for wrong in ("1e-42", "nan", "-1", "1000"):
        assert "0 or from 0.01 to 100" in chat(options=["--temperature", wrong], code=2).stderr
    wrong = CliRunner().invoke(main, ["generate", "no", "1 + 1", "--temperature", "0"])
    assert "it is from 0.01 to 100" in wrong.stderr
    compared = chat(QUESTION, options=["--compare"])
    assert compared.stdout.splitlines()[0] == "base:"
    assert f"policy:\n{first}\n" in compared.stdout


def test_a_temperature_draws_by_the_seed(chat):
    drawn = [
        [
            one["text"]
            for one in answers(chat(QUESTION, "/retry", options=["--json", "--temperature", "3", "--seed", seed]))
        ]
        for seed in ("0", "0", "1")
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1]


def test_commands(session, tmp_path, monkeypatch):
    greedy = session.temperature
    for command in ("/temperature 0.5", "/system Be brief.", "/adapter off"):
        assert session.command(command)
    session.say(QUESTION)
    (turn,) = session.turns
    assert set(turn.answers) == {False}
    assert session.model.renderer.system_prompt == "Be brief."
    file = tmp_path / "chat.json"
    session.command(f"/save {file}")
    saved = json.loads(file.read_text())
    assert saved["turns"][0]["message"] == QUESTION
    assert saved["turns"][0]["answers"][0]["text"] == turn.answers[False].text
    session.turns[0].message = 'an "open\nsesame" \u5bc6\u7801'
    monkeypatch.setenv("MY_KEY", 'open\nsesame" \u5bc6')
    session.command(f"/save {tmp_path / 'again.json'}")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["turns"][0]["message"] == 'an "***\u7801'
    session.turns[0].message = QUESTION
    assert (saved["temperature"], saved["system_prompt"]) == (0.5, "Be brief.")
    session.command('/system ""')
    assert session.model.renderer.system_prompt is None
    session.command("/compare")
    session.command("/retry")
    assert set(session.turns[0].answers) == {False, True}
    session.command("/reset")
    assert not session.turns
    assert not session.command("/quit")
    for wrong, reason in {
        "/undo": "no message yet", "/temperature hot": "not a temperature: hot",
        "/temperature nan": "not a temperature",
        "/temperature 1e-42": "0 or from 0.01 to 100", "/temperature": "not a temperature: nothing",
        f"/save {file}": "nothing is overwritten", "/save": "takes the name", "/save /no/folder/x": "cannot be written",
        "/save ~no.such.user/x": "cannot be written", f"/save {'x' * 300}": "cannot be written",
        "/save a\0b": "cannot be written",
        "/resett": "did you mean /reset", "/adapter maybe": "takes on or off",
    }.items():  # fmt: skip
        with pytest.raises(PopoError) as caught:
            session.command(wrong)
        assert reason in str(caught.value)
    assert greedy == 0


def test_a_full_context_is_explained(session, capsys):
    long = "12 + " * 180
    session.say(long)
    with pytest.raises(PopoError, match="the model's context is 1,024") as caught:
        session.say(long)
    assert "/undo" in caught.value.next_step
    assert len(session.turns) == 1
    session.command("/reset")
    session.say(QUESTION)
    with pytest.raises(PopoError, match="model's context") as caught:
        session.say("7" * 2000)
    session.command("/reset")
    # Not one token more than there is room for: 1,024 - 9 of the template.
    session.say("7" * 1010)
    for answer in session.turns[0].answers.values():
        assert len(answer.prompt_ids) + len(answer.token_ids) <= 1024
        assert answer.finish_reason == "stop" or len(answer.prompt_ids) + len(answer.token_ids) == 1024


def test_what_a_model_writes_cannot_steer_the_terminal(chat, monkeypatch):
    hostile = "\x1b]0;owned\x07 \x1b[2J\u202e red\r\n key sesame-sesame-1 \x9b5m end"
    monkeypatch.setenv("MY_API_KEY", "sesame-sesame-1")
    monkeypatch.setattr(Renderer, "text", lambda self, ids: hostile[: 6 * len(ids)])
    shown = chat(QUESTION, options=["--max-tokens", "12"]).stdout
    assert "owned" in shown
    assert "sesame" not in shown.replace("***", "")
    assert all(character.isprintable() or character == "\n" for character in shown)


def test_an_environments_run_goes_on_from_its_own_tokens(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    recipe = RunFolder(run).recipe().with_values({"rollout.environment.name": "game:Game"})
    (folder / "recipe.toml").write_text(dump_recipe(recipe))
    subject = open_subject(str(folder), None, None)
    with open_chat(subject, None, compare=False, trust=False, source="run") as model:
        session = Session(model, ChatScreen(plain=True), temperature=0, max_tokens=None, seed=0, compare=False)
        session.introduce()
        session.say(QUESTION)
        session.say("wrong, again")
    assert "trained in conversations with game:Game" in capsys.readouterr().err
    first, second = (turn.answers[True] for turn in session.turns)
    own = (*first.prompt_ids, *first.token_ids)
    assert second.prompt_ids[: len(own)] == own
    assert "wrong, again" in model.renderer.text(second.prompt_ids[len(own) :])


def test_a_model_that_is_no_run(chat, tmp_path):
    model = shutil.copytree(TINY_FOLDER, tmp_path / "model")
    assert answers(chat(QUESTION, model=model, options=["--json"]))[0]["weights"] == "model"
    assert "nothing to compare it with" in " ".join(chat(model=model, options=["--compare"], code=2).stderr.split())
    assert "has no siamese" in chat(model=model, options=["--weights", "siamese"], code=2).stderr
    assert "without an adapter" in chat("/adapter", model=model, code=2).stderr
    (model / "chat_template.jinja").unlink()
    done = chat(QUESTION, model=model)
    assert "has no chat template, so messages are lines of text" in " ".join(done.stderr.split())
    template = tmp_path / "t.jinja"
    shutil.copy(TINY_FOLDER / "chat_template.jinja", template)
    again = chat(QUESTION, model=model, options=["--chat-template", template])
    assert "chat template" not in again.stderr
    assert again.stdout == chat(QUESTION, model=TINY_FOLDER).stdout


def test_an_export_is_asked_as_its_run_was_trained(run, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    values = {
        "data.system_prompt": "Be brief.",
        "rollout.max_completion_length": 33,
        "reward.thinking_tags": ("<a>", "</a>"),
    }
    (folder / "recipe.toml").write_text(dump_recipe(RunFolder(run).recipe().with_values(values)))
    model = shutil.copytree(TINY_FOLDER, folder / "export" / "merged-policy")
    recipe = open_subject(str(model), None, None).recipe
    assert {key: attrgetter(key)(recipe) for key in values} == values
    assert recipe.model.id == str(model)
    assert capsys.readouterr().err == ""
    moved = model.rename(tmp_path / "moved")
    assert open_subject(str(moved), None, None).recipe.data.system_prompt is None
    assert "is not in the export/ of a run" in " ".join(capsys.readouterr().err.split())


def test_ctrl_c_ends_a_script(chat, monkeypatch):
    def stop(*_, final=False):
        if not final:
            raise KeyboardInterrupt
        return ()

    monkeypatch.setattr("popo_lite.tools.chat.model.SHOW_SECONDS", 0)
    monkeypatch.setattr(Pieces, "push", stop)
    assert chat(QUESTION, QUESTION, code=130).stdout.strip() == ""


def test_text_that_is_not_utf8_is_refused(run, session):
    for line in ("caf\udce9", "/save caf\udce9", "/system caf\udce9"):
        with pytest.raises(PopoError, match="not UTF-8 text"):
            _take(session, line)
    assert "not UTF-8" in CliRunner().invoke(main, ["chat", str(run), "--system-prompt", "\udce9"]).stderr
    done = CliRunner().invoke(main, ["chat", str(run)], input=b"caf\xe9\n")
    assert done.exit_code == 2
    assert "not UTF-8 text" in done.stderr


class Terminal:
    """The real command on a pseudo-terminal, whose screen pyte draws."""

    def __init__(self, *arguments, columns):
        import fcntl
        import pty
        import struct
        import termios

        import pyte

        self.screen = pyte.HistoryScreen(columns, 60)
        self._stream = pyte.ByteStream(self.screen)
        self._master, slave = pty.openpty()
        self.screen.write_process_input = lambda reply: os.write(self._master, reply.encode())  # where the cursor is
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 60, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import fcntl, sys, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
             "from popo_lite.cli import main\nmain(sys.argv[1:])", *map(str, arguments)],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        os.close(slave)

    @property
    def text(self):
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def send(self, keys, prompt="policy", *, ends=False):
        """Type `keys` when the chat waits for them with this prompt; unless that `ends` it, until it has taken them."""
        self.wait(f"\n{prompt}>\n")
        os.write(self._master, keys)
        while not ends and f"\n{prompt}>\n" in self.text:
            self._read()

    def wait(self, *texts, seconds=60):
        """Wait until one of `texts` is on the screen, and return it."""
        limit = time.monotonic() + seconds
        while not (found := next((text for text in texts if text in self.text), None)):
            assert time.monotonic() < limit, self.text
            self._read()
        return found

    def _read(self):
        if select.select([self._master], [], [], 0.1)[0]:
            with suppress(OSError):
                self._stream.feed(os.read(self._master, 65536))

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(run):
    pytest.importorskip("pyte")
    if sys.platform == "win32":
        pytest.skip("pseudo-terminals")
    opened = Terminal("chat", run, "--weights", "policy", "--temperature", "0", "--max-tokens", "300", columns=120)
    yield opened
    opened.close()


def test_on_a_terminal(terminal, run):
    policy, base = (expected([{"role": "user", "content": QUESTION}], folder) for folder in (run / "adapter", None))
    policy, base = (text.splitlines()[0][:50] for text in (policy, base))
    question = QUESTION.encode() + b"\r"
    terminal.send(question)
    terminal.wait(f"{QUESTION}\n{policy}")
    terminal.send(b"/undo\r")
    terminal.wait(f"forgot: {QUESTION}")
    terminal.wait("F2: base   temperature 0 ")
    terminal.send(b"\x1bOQ")  # F2
    terminal.send(question, "base")
    terminal.wait(f"base> {QUESTION}\n{base}")
    terminal.send(b"/reset\r", "base")
    terminal.send(b"/compare\r", "base")
    terminal.send(question, "base and policy")
    terminal.wait(f"{base:<60}{policy}")  # side by side
    terminal.send(b"\x14", "base and policy")  # Ctrl-T
    terminal.send(b"line one\x1b\rline two\r")
    terminal.wait("line one\n  line two\n")
    terminal.send(b"/temperature 100\r")
    for _ in range(20):  # answers at random, most of them long
        terminal.send(b"/reset\r")
        terminal.send(b"go\r")
        terminal.wait("> go\n")
        time.sleep(0.1)
        os.write(terminal._master, b"\x03")
        if terminal.wait("stopped)", "Ctrl-D leaves\npolicy") == "stopped)":
            break
    assert "stopped)" in terminal.text
    terminal.send(b"/nonsense\r")
    terminal.wait("there is no command /nonsense")
    terminal.send(b"\x04", ends=True)
    terminal.wait(f"To keep the model:  popo-lite export {run} --weights policy")
    assert terminal.process.wait(30) == 0
