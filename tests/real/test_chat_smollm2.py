"""A conversation with a real model, from its GGUF file."""

from __future__ import annotations

import json

from click.testing import CliRunner

from popo_lite.cli import main


def test_a_conversation_goes_on(smollm2):
    lines = "What is the capital of France?\nAnd what is the capital of Italy?\n"
    options = ["--temperature", "0", "--max-tokens", "24", "--json"]
    done = CliRunner().invoke(main, ["chat", str(smollm2), *options], input=lines)
    assert done.exit_code == 0, done.output
    first, second = map(json.loads, done.stdout.splitlines())
    assert "Paris" in first["text"]
    assert "Rome" in second["text"]
    assert second["prompt_tokens"] > first["prompt_tokens"] + first["tokens"]
