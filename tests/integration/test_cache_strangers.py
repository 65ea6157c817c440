"""Caches whose publisher means harm: nothing is written, read or emptied outside the target."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from stillroom.cache_schemas import canonical, layout
from stillroom.cache_schemas.errors import CacheError, PlanMismatch, ShardCorrupt
from stillroom.pipeline.cache.care.repair import repair
from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.sharing.copying import copy
from stillroom.pipeline.cache.sharing.rewriting import reshard
from stillroom.pipeline.cache.sharing.signing import check_signature, sign
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.cache.storage.snapshot import pinned
from tests.cache_trials import contents
from tests.synthetic_records import make_plan, write_cache


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    plan = make_plan(hidden_layers=[2])
    return write_cache(tmp_path_factory.mktemp("original") / "cache", plan)


@pytest.fixture
def hostile(original, tmp_path):
    """A copy that may be spoilt."""
    shutil.copytree(original, tmp_path / "hostile")
    return tmp_path / "hostile"


def rewrite_manifest(root: Path, change) -> None:
    """Change a manifest's body and sign it again, as its publisher can."""
    body = canonical.check((root / layout.MANIFEST).read_bytes(), "manifest")
    change(body)
    (root / layout.MANIFEST).write_bytes(canonical.sign(body))


class Replaced(DirectoryStorage):
    """A source whose manifest is another one from its second reading on."""

    def __init__(self, root: Path, later: bytes):
        super().__init__(root)
        self.later, self.readings = later, 0

    def read(self, name, start=0, length=None):
        data = super().read(name, start, length)
        if name != layout.MANIFEST:
            return data
        self.readings += 1
        return data if self.readings == 1 else self.later


@pytest.mark.parametrize(
    "name", ["{outside}/planted", "../planted", "a/../../planted", "notes.txt"]
)
def test_a_manifest_cannot_name_a_file(hostile, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    name = name.format(outside=outside)
    planted = hostile / name
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_bytes(b"payload")
    entry = {"bytes": 7, "sha256": hashlib.sha256(b"payload").hexdigest()}
    rewrite_manifest(hostile, lambda body: body["files"].update({name: entry}))
    planted.unlink()
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(ShardCorrupt, match="does not list the files of this cache"):
        copy(DirectoryStorage(hostile), DirectoryStorage(tmp_path / "copy"))
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["/etc/hostname", "../x", "rows/../../x", "", "rows//x", "./x"])
def test_a_directory_has_no_names_that_lead_out(tmp_path, name):
    storage = DirectoryStorage(tmp_path / "cache")
    for deed in (storage.read, storage.size, storage.delete, lambda n: storage.create(n, b"x")):
        with pytest.raises(CacheError, match="is no name of a cache's file"):
            deed(name)


@pytest.mark.parametrize("verb", ["repair", "reshard", "copy"])
def test_staging_that_is_a_link_is_not_emptied(original, hostile, tmp_path, verb):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "0123456789abcdef").write_text("thesis")
    os.symlink(precious, hostile / layout.STAGING)
    (hostile / layout.MANIFEST).unlink()
    deed = {
        "repair": lambda: repair(DirectoryStorage(hostile)),
        "reshard": lambda: reshard(TeacherCache.open(original), hostile, 2),
        "copy": lambda: copy(DirectoryStorage(original), DirectoryStorage(hostile)),
    }[verb]
    with pytest.raises(CacheError, match="is a symbolic link"):
        deed()
    assert (precious / "0123456789abcdef").read_text() == "thesis"


def test_sweeping_leaves_what_is_not_ours(tmp_path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "my notes").write_text("mine")
    (tmp_path / "tmp" / "0123456789abcdef").mkdir()
    DirectoryStorage(tmp_path).sweep()
    assert [p.name for p in (tmp_path / "tmp").iterdir()] == ["my notes"]


@pytest.mark.parametrize("held", ["README.md", "partial.json", "tmp/notes.txt", "rows"])
@pytest.mark.parametrize("verb", ["copy", "reshard"])
def test_a_place_with_other_files_is_refused_untouched(original, tmp_path, held, verb):
    target = tmp_path / "mine"
    (target / held).parent.mkdir(parents=True)
    (target / held).write_text("mine")
    deed = {
        "copy": lambda: copy(DirectoryStorage(original), DirectoryStorage(target)),
        "reshard": lambda: reshard(TeacherCache.open(original), target, 2),
    }[verb]
    with pytest.raises(CacheError, match="and no cache"):
        deed()
    assert contents(target) == {held: b"mine"}


def test_a_copy_is_of_the_manifest_that_was_checked(original, tmp_path):
    source = Replaced(original, b"<html>")
    copy(source, DirectoryStorage(tmp_path / "copy"))
    assert contents(tmp_path / "copy") == contents(original)


def test_a_signature_is_of_the_manifest_that_is_copied(original, hostile, tmp_path, keys):
    sign(DirectoryStorage(hostile), keys / "private.pem")
    signed = (hostile / layout.MANIFEST).read_bytes()
    rewrite_manifest(hostile, lambda body: body["shards"]["num_tokens"].__setitem__(0, 1))
    changed = (hostile / layout.MANIFEST).read_bytes()
    (hostile / layout.MANIFEST).write_bytes(signed)
    source = pinned(Replaced(hostile, changed))
    check_signature(source, keys / "public.pem")
    copy(source, DirectoryStorage(tmp_path / "copy"))
    assert (tmp_path / "copy" / layout.MANIFEST).read_bytes() == signed


def test_a_cache_that_was_published_anew_meanwhile_says_so(hostile, tmp_path):
    (hostile / layout.rows(1)).write_bytes(b"of another cache")
    source = Replaced(hostile, b"another manifest")
    with pytest.raises(CacheError, match="another cache has been published there meanwhile"):
        copy(source, DirectoryStorage(tmp_path / "copy"))
    assert not (tmp_path / "copy" / layout.MANIFEST).exists()


@pytest.mark.parametrize("broken", [b"", b"<html>not found</html>", b'{"half": '])
def test_a_broken_manifest_at_the_target_is_mended(original, tmp_path, broken):
    copy(DirectoryStorage(original), DirectoryStorage(tmp_path / "copy"))
    (tmp_path / "copy" / layout.MANIFEST).write_bytes(broken)
    copy(DirectoryStorage(original), DirectoryStorage(tmp_path / "copy"))
    assert contents(tmp_path / "copy") == contents(original)


def test_another_cache_at_the_target_still_stops(original, tmp_path):
    other = write_cache(tmp_path / "other", make_plan(num_examples=3))
    with pytest.raises(PlanMismatch, match="another cache lies there"):
        copy(DirectoryStorage(original), DirectoryStorage(other))


def test_a_snapshot_of_the_hub_is_read_through_its_links(original, tmp_path):
    """`hf download` makes `snapshots/COMMIT/NAME -> ../../blobs/HASH`."""
    snapshot, blobs = tmp_path / "d--a--b/snapshots/c0ffee", tmp_path / "d--a--b/blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in Path(original).rglob("*") if p.is_file())):
        link = snapshot / path.relative_to(original)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(number))
        os.symlink(os.path.relpath(blobs / str(number), link.parent), link)
    assert len(TeacherCache.open(snapshot)) > 0
    assert not verify(DirectoryStorage(snapshot)).problems
    elsewhere = tmp_path / "secret"
    elsewhere.write_bytes((blobs / "0").read_bytes())
    first = next(p for p in sorted(snapshot.rglob("*")) if p.is_symlink())
    first.unlink()
    os.symlink(elsewhere, first)
    with pytest.raises(CacheError, match="symbolic link"):
        DirectoryStorage(snapshot).read(str(first.relative_to(snapshot)))


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    place, key = tmp_path_factory.mktemp("keys"), Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (place / "private.pem").write_bytes(private)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (place / "public.pem").write_bytes(public)
    return place
