"""An optional ed25519 signature of the manifest.

One idea: the manifest names every byte of a cache, so signing its digest signs the cache. Keys are
PEM files that stay with their owner; nothing secret is ever written into a cache.
"""

import importlib.util
from pathlib import Path
from typing import Any

from stillroom.cache_schemas import canonical, layout
from stillroom.cache_schemas.errors import CacheError, PlanMismatch
from stillroom.cache_schemas.manifest import Manifest, read
from stillroom.pipeline.cache.storage.protocol import Storage

CONTEXT = b"stillroom manifest v1\n"


def sign(storage: Storage, private_key: str | Path) -> None:
    """Write manifest.sig beside the manifest.

    Raises:
        CacheError: no manifest, or the file is not an unencrypted ed25519 private key.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = _load(private_key, lambda data: load_pem_private_key(data, None), Ed25519PrivateKey)
    message = _message(storage)
    body = {
        "algorithm": "ed25519",
        "public_key": key.public_key().public_bytes_raw().hex(),
        "signature": key.sign(message).hex(),
    }
    storage.replace(layout.SIGNATURE, canonical.sign(body, indent=1))


def check_signature(storage: Storage, public_key: str | Path) -> None:
    """Refuse a cache whose manifest was not signed by the owner of a key.

    Raises:
        PlanMismatch: there is no signature, it is another key's, or the manifest was changed.
        CacheError: the file is not an ed25519 public key.
    """
    _need_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key = _load(public_key, load_pem_public_key, Ed25519PublicKey)
    where = f"{storage.location}/{layout.SIGNATURE}"
    try:
        body = canonical.check(storage.read(layout.SIGNATURE), where)
        key.verify(bytes.fromhex(str(body.get("signature"))), _message(storage))
    except FileNotFoundError:
        raise PlanMismatch("there is no signature", where=where) from None
    except (InvalidSignature, ValueError):
        raise PlanMismatch(
            "the signature is not this key's for this manifest",
            where=where,
            remedy="Do not use this copy; ask its publisher.",
        ) from None


def _need_cryptography() -> None:
    if importlib.util.find_spec("cryptography") is None:
        raise CacheError(
            "signatures need the package 'cryptography'",
            remedy="pip install 'stillroom[sign]'",
        )


def _message(storage: Storage) -> bytes:
    where = f"{storage.location}/{layout.MANIFEST}"
    try:
        manifest = read(Manifest, storage.read(layout.MANIFEST), where)
    except FileNotFoundError:
        raise CacheError("there is no sealed cache here", where=storage.location) from None
    return CONTEXT + manifest.digest.encode()


def _load(path: str | Path, parse: Any, kind: type) -> Any:
    try:
        key = parse(Path(path).read_bytes())
    except FileNotFoundError:
        raise CacheError("no such key file", where=str(path)) from None
    except (ValueError, TypeError) as error:
        raise CacheError(f"is not a PEM key ({str(error)[:80]})", where=str(path)) from None
    if not isinstance(key, kind):
        raise CacheError("is not an ed25519 key", where=str(path))
    return key
