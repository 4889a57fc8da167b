"""Passwords and tokens in text, and the URLs that a recipe may send them to."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from popo_lite.errors import RecipeError
from popo_lite.recipe_file import load_recipe
from popo_lite.recipe_rules import is_local_url, wrong_server_url
from popo_lite.redaction import SHORTEST_SECRET, redact


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("no connection to http://me:pa55word@host:8000/v1.", "no connection to http://***@host:8000/v1."),
        ("https://only-user@host", "https://***@host"),
        ("a sign in it: http://me:p@s:s!@host/a@b", "a sign in it: http://***@host/a@b"),
        pytest.param(f"long: http://me:{'x' * 9000}@host", "long: http://***@host", id="long"),
        (
            "?X-Amz-Signature=a0&apiKey=b1&key=c2&hub.access_key=d3",
            "?X-Amz-Signature=***&apiKey=***&key=***&hub.access_key=***",
        ),
        ("1http://me:x@host HTTPS://ME:X@HOST", "1http://***@host HTTPS://***@HOST"),
        ("GET https://host/v1?a=1&api_key=abcdef&b=2", "GET https://host/v1?a=1&api_key=***&b=2"),
        ("the token is hf_planted_1234, twice: hf_planted_1234", "the token is ***, twice: ***"),
        ("the proxy's password pr0xy-pass", "the proxy's password ***"),
        ("me@host.org, https://host.org/a and 5 @ 2", "me@host.org, https://host.org/a and 5 @ 2"),
        ("a switch: true, a word: python_tests", "a switch: true, a word: python_tests"),
        ("https://medium.com/@user/post https://unpkg.com/react@18.2/x.js", None),
        ("[site](https://host.org)|[mail](mailto:me@host.org), https://host?to=me@host.org, https://host#@me", None),
        ("https://host/a?sort_key=name&monkey=1", None),
    ],
)
def test_secrets_are_masked_and_nothing_else(text, masked, monkeypatch):
    monkeypatch.setenv("APP_KEY", "python")
    monkeypatch.setenv("HF_TOKEN", "hf_planted_1234")
    monkeypatch.setenv("all_proxy", "http://me:pr0xy-pass@proxy:3128")
    monkeypatch.setenv("USE_TOKEN", "true")
    assert redact(text) == (text if masked is None else masked)


@pytest.mark.parametrize("name", ["GITHUB_PAT", "DB_PASS", "db_pwd", "OPENAI_API_KEYS", "MY_TOKEN_1", "AWS_SECRETS"])
def test_names_of_variables_that_hold_secrets(name, monkeypatch):
    monkeypatch.setenv(name, "planted-123")
    assert redact("it is planted-123") == "it is ***"


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=SHORTEST_SECRET), st.text())
def test_no_spelling_of_a_secret_is_left(secret, text):
    secret = secret.strip()
    assume(len(secret) >= SHORTEST_SECRET and secret not in text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", secret)
        for spelled in (secret, repr(secret), json.dumps(secret), repr(OSError(secret)), json.dumps([f"a {secret}"])):
            shown = redact(f"{text} {spelled}")
            assert secret not in shown
            assert repr(secret)[1:-1] not in shown
            assert json.dumps(secret)[1:-1] not in shown


def test_a_proxy_password_is_masked_as_libraries_decode_it(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://me:planted%21%40pass@proxy:1 http://you:another-one@proxy")
    assert redact("Basic me:planted!@pass, planted%21%40pass, another-one") == "Basic me:***, ***, ***"


def test_a_long_text_takes_no_time():
    start = time.perf_counter()
    for text in (
        "a" * 10**6,
        "://" * 10**5,
        "://" + "a" * 10**6,
        "://a" * 10**5,
        "?" + "key" * 10**5,
        "?api_key" * 10**5,
        "?token" * 10**5,
        "@" * 10**6,
    ):
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
