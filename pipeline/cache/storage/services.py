"""What the services behind fsspec differ in: settings, packages, and where credentials go.

One idea: all that is known of one kind of service by its protocol stands here. It opens nothing.
"""

from typing import Any

import fsspec.config

from stillroom.cache_schemas.errors import CacheError
from stillroom.cache_schemas.scrubbing import user_of

READ_TIMEOUT_SECONDS = 60
_AWS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile and its name into AWS_PROFILE"
_GOOGLE = "a file, and its path into GOOGLE_APPLICATION_CREDENTIALS"
CREDENTIALS = {"s3": _AWS, "s3a": _AWS, "gs": _GOOGLE, "gcs": _GOOGLE}
"""Protocol -> where its service looks for them."""


def check_no_credentials(url: str, location: str) -> None:
    """Refuse name and password before a bucket: its services take them for a part of the name."""
    variables = CREDENTIALS.get(url.split("://", 1)[0])
    if variables and user_of(url):
        raise CacheError(
            "credentials do not belong into this URL",
            expected="scheme://bucket/folder",
            where=location,
            remedy=f"Put them into {variables}.",
        )


def missing_package(url: str) -> str:
    """What to install for a protocol that needs more than we do."""
    extras = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
    extra = extras.get(url.split("://", 1)[0])
    return f"; `pip install 'stillroom[{extra}]'` adds what it needs" if extra else ""


def defaults(url: str) -> dict[str, Any]:
    """Time limits, and settings that S3 servers other than Amazon's need."""
    protocol = url.split("://", 1)[0]
    if protocol in ("http", "https"):
        import aiohttp

        return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_read=READ_TIMEOUT_SECONDS)}}
    if protocol not in ("s3", "s3a"):
        return {}
    config = {
        "read_timeout": READ_TIMEOUT_SECONDS,
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    own = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
    return {"config_kwargs": config | own}
