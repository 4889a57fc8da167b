"""Passwords and tokens in text, and the URLs that a recipe may send them to."""

from __future__ import annotations

import time

import pytest

from popo_lite.errors import RecipeError
from popo_lite.recipe_file import load_recipe
from popo_lite.recipe_rules import is_local_url, wrong_server_url
from popo_lite.redaction import redact


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("no connection to http://me:pa55word@host:8000/v1.", "no connection to http://***@host:8000/v1."),
        ("https://only-user@host", "https://***@host"),
        ("a sign in it: http://me:p@ss/wo?rd#1@host", "a sign in it: http://***@host"),
        ("1http://me:x@host HTTPS://ME:X@HOST", "1http://***@host HTTPS://***@HOST"),
        ("GET https://host/v1?a=1&api_key=abcdef&b=2", "GET https://host/v1?a=1&api_key=***&b=2"),
        ("the token is hf_planted_1234, twice: hf_planted_1234", "the token is ***, twice: ***"),
        ("the proxy's password pr0xy-pass", "the proxy's password ***"),
        ("me@host.org, https://host.org/a and 5 @ 2", "me@host.org, https://host.org/a and 5 @ 2"),
        ("a switch: true", "a switch: true"),
    ],
)
def test_secrets_are_masked_and_nothing_else(text, masked, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted_1234")
    monkeypatch.setenv("all_proxy", "http://me:pr0xy-pass@proxy:3128")
    monkeypatch.setenv("USE_TOKEN", "true")
    assert redact(text) == masked


def test_a_long_text_takes_no_time():
    start = time.perf_counter()
    for text in ("a" * 10**6, "://" * 10**5, "?token" * 10**5, "@" * 10**6):
        redact(text)
    assert time.perf_counter() - start < 5


SERVER = ("rollout.engine=server", "rollout.server.shared_dir=/shared")


@pytest.mark.parametrize("place", ["file", "--set", "wrong engine", "wrong key", "broken"])
def test_a_login_in_a_recipe_is_refused_and_not_printed(place, tmp_path):
    file, url = tmp_path / "mine.toml", "https://me:pa55word@host:8000"
    urls = f'["{url}"]'
    file.write_text(f"[rollout.server]\nbase_urls = {urls}\n" if place == "file" else "")
    overrides = {
        "file": SERVER,
        "--set": (*SERVER, f"rollout.server.base_urls={urls}"),
        "wrong engine": (f"rollout.server.base_urls={urls}",),
        "wrong key": (f"rollout.server.base_url={urls}",),
        "broken": (f'rollout.server.base_urls=["{url}',),
    }[place]
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    assert "pa55word" not in str(caught.value)
    assert "host:8000" in str(caught.value)
    assert ("POPO_SERVER_TOKEN" in str(caught.value)) == (place in ("file", "--set", "wrong engine"))


def test_a_login_in_another_setting_is_refused(tmp_path):
    (tmp_path / "mine.toml").write_text('[data]\nsystem_prompt = "Write ftp://name:password@host."\n')
    load_recipe(tmp_path / "mine.toml")  # text that only looks like one
    options = 'rollout.environment.options={database = "sql://me:pa55word@host/db"}'
    with pytest.raises(RecipeError, match="options.*holds a login") as caught:
        load_recipe("tiny_cpu", ["rollout.environment.name=a:B", options])
    assert "pa55word" not in str(caught.value)


LOCAL = ["http://127.0.0.1:8000", "http://127.9.9.9", "http://[::1]:8000/v1", "http://localhost",
         "http://0.0.0.0:8000", "http://LOCALHOST:80"]  # fmt: skip
ELSEWHERE = ["http://10.0.0.7:8000", "http://localhost.example.org", "http://127.0.0.1.example.org", "http://[fe80::1]",
             "http://node7:8000/v1", "http://2130706433"]  # fmt: skip
NO_URL = ["http://a b", r"http://127.0.0.1\.example.org", "http://host/?token=x", "http://host#x", "ftp://localhost",
          "", "http://127.0.0.1%2eexample.org", "http://ｌocalhost", "http://localhost\n"]  # fmt: skip


def test_plain_http_leaves_the_machine_only_if_it_is_allowed():
    for url in LOCAL:
        assert is_local_url(url), url
        assert wrong_server_url(url, allow_http=False) is None, url
    for url in ELSEWHERE:
        assert not is_local_url(url), url
        assert "rollout.server.allow_http = true" in str(wrong_server_url(url, allow_http=False)), url
        assert wrong_server_url(url, allow_http=True) is None, url
        assert wrong_server_url(url.replace("http:", "https:"), allow_http=False) is None, url
    for url in NO_URL:
        assert not is_local_url(url), url
        assert "is no URL" in str(wrong_server_url(url, allow_http=True)), url


def test_the_next_step_of_a_refused_url_works():
    url = 'rollout.server.base_urls=["http://node7:8000"]'
    with pytest.raises(RecipeError, match="in plain text"):
        load_recipe("tiny_cpu", [*SERVER, url])
    load_recipe("tiny_cpu", [*SERVER, url, "rollout.server.allow_http=true"])
