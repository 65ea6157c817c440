"""What a secret looks like, and what looks like one and is none."""

import pytest

from stillroom.cache_schemas import scrubbing
from stillroom.cache_schemas.errors import CacheError
from stillroom.cache_schemas.scrubbing import scrub, scrubbed

SECRET = "wJalr/XUtn+FEMI=K7MDENG"


@pytest.mark.parametrize(
    "text",
    [
        f"https://alice:{SECRET}@host/cache: not found",
        f"s3://AKIA0:{SECRET}@bucket/cache",
        f"https://{SECRET.replace('/', '')}@host/cache",
        f"https://host/cache?token={SECRET}",
        f"GET 'https://host/c?a=1&X-Amz-Signature={SECRET}' failed",
        f"https://host/c#access_token={SECRET}",
        f"AWS_SECRET_ACCESS_KEY={SECRET} stillroom",
        f"{{'key': 'a', 'secret': '{SECRET}'}}",
        f'{{"hf_token": "{SECRET}"}}',
        f"Client(secretKey={SECRET}, region=x)",
        f"Authorization: Bearer {SECRET}",
        f"headers: {{'Authorization': 'Basic {SECRET}'}}",
        f"sig={SECRET}&se=2030",
        f"x-amz-security-token: {SECRET}",
        f"password={SECRET};Server=x",
        f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----",
    ],
)
def test_secrets_are_hidden_by_their_place(text):
    shown = scrub(text)
    assert SECRET not in shown
    assert SECRET.split("/")[1] not in shown
    assert scrubbing.HIDDEN in shown


@pytest.mark.parametrize(
    "token",
    [
        "hf_" + "a" * 34,
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "b" * 36,
        "sk-proj-" + "c" * 40,
        "AIza" + "d" * 35,
        "eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl",
        "xoxb-1234567890-abc",
    ],
)
def test_secrets_are_hidden_by_their_form(token):
    assert token not in scrub(f"refused: {token}.")


def test_secrets_are_hidden_by_their_value(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "plain words")
    scrubbing.remember("https://bob:correct%20horse@host/x?ticket=battery-staple")
    shown = scrub("said 'plain words', correct horse, correct%20horse, battery-staple")
    assert shown == "said '***', ***, ***, ***"


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/owner/name@main/folder",
        "https://host:8080/a/b",
        "s3://bucket/cache/rows/000/000001.arrow: has 3 bytes; expected 12",
        "tokens=12 tokenizer=/models/a eos_token=</s> keys: a, b",
        "the first token: 17",
        "unknown key 'kep_every'",
        "file:///tmp/cache",
        "3 examples @ 12 tokens",
    ],
)
def test_what_is_no_secret_stays(text):
    assert scrub(text) == text


def test_json_is_scrubbed_by_its_keys_too():
    given = {"engine_args": {"hf_token": "short", "seed": 3, "eos_token": "</s>"}, "k": [1, None]}
    assert scrubbed(given) == {
        "engine_args": {"hf_token": "***", "seed": 3, "eos_token": "</s>"},
        "k": [1, None],
    }


def test_an_error_never_holds_a_secret():
    error = CacheError("cannot be read", where=f"https://a:{SECRET}@host/x", remedy="Go.")
    assert str(error) == "https://***@host/x: cannot be read. Go."
