"""`stillroom cache`: results on stdout, one message on stderr, exit codes, nothing lost."""

import json
import re
import shutil

import pytest

from stillroom.cache_schemas import layout
from stillroom.stages.__main__ import run
from tests import memory_cache
from tests.synthetic_records import make_plan, write_cache


@pytest.fixture
def cache(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run" / "cache")


def stillroom(capsys, *arguments):
    """Exit code, stdout, stderr."""
    code = run(["cache", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def test_show_tells_what_a_cache_holds(capsys, cache):
    code, out, _ = stillroom(capsys, "show", cache, "--rows", 2)
    assert code == 0
    assert "hidden.2" in out
    assert "4 of 4" in out
    assert "example 0 of 10" in out


def test_show_of_draws_alone(capsys, tmp_path):
    cache = write_cache(tmp_path, make_plan(k=0, tail_draws=4))
    code, out, _ = stillroom(capsys, "show", cache, "--rows", 2, "--guesses", 1)
    assert (code, "the teacher's draws" in out) == (0, True)
    assert len(re.findall(r"\b\d+ x1\b", out)) == 2


def test_show_of_an_unfinished_cache_tells_what_is_missing(capsys, tmp_path, plan):
    code, out, err = stillroom(capsys, "show", write_cache(tmp_path, plan, shards=[1]))
    assert (code, "1 of 4" in out) == (0, True)
    assert "3 of 4 shards are missing" in err


def test_ls_lists_sealed_and_unfinished_caches(capsys, tmp_path, cache, plan):
    write_cache(tmp_path / "half", plan, shards=[0])
    code, out, _ = stillroom(capsys, "ls", tmp_path)
    assert code == 0
    assert len(re.findall(r"\bsealed +│", out)) == 1
    assert out.count("unfinished") == 1


def test_verify_of_a_sound_cache(capsys, cache):
    code, out, _ = stillroom(capsys, "verify", cache)
    assert code == 0
    assert "4 shards, 10 examples" in out


def test_verify_of_an_unfinished_cache_is_incomplete(capsys, tmp_path, plan):
    code, _, err = stillroom(capsys, "verify", write_cache(tmp_path, plan, shards=[0]))
    assert code == 3
    assert "not sealed" in err


def test_verify_and_repair_of_a_damaged_cache(capsys, cache):
    (cache / layout.rows(2)).write_bytes(b"short")
    code, _, err = stillroom(capsys, "verify", cache)
    assert code == 2
    assert "shard 2: rows/000/000002.arrow: 5 bytes; expected" in err.replace("\n", "")
    code, out, err = stillroom(capsys, "repair", cache)
    assert code == 3
    assert "shards to capture again: 2" in out
    assert "removed receipts/000/000002.json" in err


def test_push_pull_and_partial_pull(capsys, cache, tmp_path):
    code, out, _ = stillroom(capsys, "push", cache, f"file://{tmp_path}/shared")
    assert (code, f"{tmp_path}/shared" in out.replace("\n", "")) == (0, True)
    code, _, err = stillroom(
        capsys, "pull", tmp_path / "shared", tmp_path / "part", "--signal", "logits"
    )
    assert (code, "dense: none" in err) == (0, True)
    assert stillroom(capsys, "verify", tmp_path / "part")[0] == 0
    code, _, err = stillroom(capsys, "pull", tmp_path / "shared", tmp_path / "x", "--signal", "z")
    assert (code, "no signal z" in err) == (2, True)


def test_a_signed_cache_is_pulled_only_with_its_owners_key(capsys, cache, tmp_path):
    mine, other = (key_pair(tmp_path / name) for name in ("mine", "other"))
    code, _, err = stillroom(capsys, "verify", cache, "--public-key", mine[1])
    assert (code, "there is no signature" in err) == (2, True)
    assert stillroom(capsys, "sign", cache, "--key", mine[0])[0] == 0
    pull = ("pull", cache, tmp_path / "copy", "--public-key")
    code, _, err = stillroom(capsys, *pull, other[1])
    assert (code, "not this key's" in err) == (2, True)
    assert not (tmp_path / "copy").exists()
    assert stillroom(capsys, *pull, mine[1])[0] == 0
    assert stillroom(capsys, "verify", tmp_path / "copy", "--public-key", mine[1])[0] == 0


def key_pair(path):
    """Paths of an ed25519 key pair in PEM files."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    key = Ed25519PrivateKey.generate()
    private, public = path.with_suffix(".key"), path.with_suffix(".pub")
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


def test_subset_reshard_merge_and_diff(capsys, cache, tmp_path):
    code, _, _ = stillroom(capsys, "subset", cache, tmp_path / "code", "--source", "code")
    assert code == 0
    assert stillroom(capsys, "subset", cache, tmp_path / "rest", "--source", "prose")[0] == 0
    code, _, _ = stillroom(capsys, "merge", tmp_path / "both", tmp_path / "code", tmp_path / "rest")
    assert code == 0
    code, out, err = stillroom(capsys, "diff", cache, tmp_path / "both")
    assert code == 0
    assert re.search(r"examples in both +│ +10 ", out)
    assert "plan: corpus.digest" in err
    reshard = ("reshard", cache, tmp_path / "new", "--examples-per-shard", 5)
    assert stillroom(capsys, *reshard, "--profile", "portable")[0] == 0
    assert stillroom(capsys, "verify", tmp_path / "new")[0] == 0
    code, _, err = stillroom(capsys, *reshard, "--profile", "tiny")
    assert (code, "unknown profile 'tiny'" in err) == (2, True)


@pytest.mark.parametrize("where", ["teacher", "student-initial", "nowhere"])
def test_show_finds_the_tokenizer_of_the_run(capsys, tmp_path, tiny_llama, where):
    """Named in the run's settings, or lying in its student; else `show` says what to pass."""
    captured = memory_cache.captured(tiny_llama, memory_cache.examples(2))
    captured.write(tmp_path / "cache")
    if where == "teacher":
        settings = {"teacher": {"model": str(tiny_llama)}, "prepare": None}
        (tmp_path / "capture.config.json").write_text(json.dumps(settings))
    if where == "student-initial":
        shutil.copytree(tiny_llama, tmp_path / "student-initial")
    code, out, err = stillroom(capsys, "show", tmp_path / "cache", "--rows", 1)
    assert (code, "pass --tokenizer DIR" in err) == (0, where == "nowhere")
    assert ("'" in out.splitlines()[-2]) == (where != "nowhere")


def test_ls_finds_caches_however_deep_and_none_inside_a_cache(capsys, tmp_path, plan):
    deep = write_cache(tmp_path / "a" / "b" / "c" / "d" / "e", plan, shards=[0])
    write_cache(deep / "inside", plan, shards=[0])
    write_cache(tmp_path / ".hidden", plan, shards=[0])
    code, out, _ = stillroom(capsys, "ls", tmp_path, "--json")
    assert code == 0
    assert [seen["location"] for seen in json.loads(out)] == [str(deep)]
