"""Growing answers: whatever the cuts between tokens, only printable text is shown, and all of it in the end."""

from __future__ import annotations

import pytest

from popo_lite.tools.chat.pieces import Pieces
from popo_lite.tools.console import words

TAGS = ("<think>", "</think>")
TEXTS = [
    "3 + 4 = 7, so \\boxed{7}",
    "\x1b[2J\x1b]0;owned\x07 red \x1b[31m alert\r\nover\rwritten\ttab\x00\x9b31m",
    "eins\u202etxet\u202c zwei\u200b\u2028drei " + "e" + "\u0301" * 9 + " \ud800 \ufffd",
    "visit https://user:hunter2hunter2@example.org/?token=abcdefgh now, my key is sesame-sesame-1",
    "答案是七。\n\n因此 \\boxed{7} 🎉\ufe0f 完",
    "<think>let me see</think>7 <think>again\n</think>",
]


def grown(text: str, tags=TAGS, **options):
    """Every state of the output while the text grows by one character."""
    pieces, output = Pieces(tags, **options), []
    for end in range(len(text) + 1):
        output += pieces.push(text[:end])
        yield "".join(piece for piece, _ in output)
    output += pieces.push(text, final=True)
    yield "".join(piece for piece, _ in output)


@pytest.mark.parametrize("text", TEXTS)
def test_all_is_shown_and_nothing_else(text, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "sesame-sesame-1")
    states = list(grown(text))
    assert states[-1] == words.printable(text)
    for state in states:
        assert states[-1].startswith(state)
        assert all(character.isprintable() or character == "\n" for character in state)


@pytest.mark.parametrize(
    "secrets",
    [
        ["open sesame now"],
        ["pässwörd größer"],
        ["密码是七八九十密码是"],
        ["xx yy zz ww", "zz ww vv uu"],
        ["a b a b c d", "b a b x y z"],
    ],
)
def test_secrets_with_blanks_and_other_letters_are_never_shown(secrets, monkeypatch):
    for number, secret in enumerate(secrets):
        monkeypatch.setenv(f"MY_KEY_{number}", secret)
    begun = [secret[: len(secret) // 2] for secret in secrets]
    for text in (f"so {' '.join(secrets)} it is", f"{secrets[0]}{secrets[-1]}", f"{begun[0]} {secrets[-1]} end"):
        states = list(grown(text))
        assert states[-1] == words.printable(text)
        for state in states:
            assert states[-1].startswith(state)  # no part of a secret, which the last state masks
    assert list(grown("so opening it is "))[-2].startswith("so opening it is")


def test_words_appear_while_the_text_grows():
    states = set(grown("one two three"))
    assert {"one ", "one two ", "one two three"} <= states


def test_a_character_in_parts_waits_for_the_rest():
    pieces = Pieces(TAGS)
    assert list(pieces.push("so \ufffd\ufffd")) == [("so ", False)]
    assert list(pieces.push("so 🎉 ")) == [("🎉 ", False)]


@pytest.mark.parametrize("tags", [TAGS, ("◁think▷", "◁/think▷"), ("[start it]", "[end it]")])
def test_thinking_is_told_apart_wherever_its_tags_are_cut(tags):
    opening, closing = tags
    text = f"{opening}first 1 < 2 {closing} then{opening}more"
    for size in range(1, 9):
        pieces, marked = Pieces(tags), []
        for end in range(0, len(text), size):
            marked += pieces.push(text[:end])
        marked += pieces.push(text, final=True)
        thought = "".join(piece for piece, thinking in marked if thinking)
        assert thought == f"{opening}first 1 < 2 {closing}{opening}more"


def test_an_answer_may_begin_inside_its_thinking():
    pieces = Pieces(TAGS, thinking=True)
    assert list(pieces.push("hm </think> 7", final=True)) == [("hm ", True), ("</think>", True), (" 7", False)]
