"""What a URL in a config must look like."""

import re

_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")


def sound(url: str) -> str:
    """Return `url`; raise `ValueError` if it carries credentials or names no possible bucket."""
    scheme, _, rest = url.partition("://")
    if scheme in ("s3", "hf") and "@" in rest.split("/")[0]:
        raise ValueError(
            "must not carry credentials; they come from the standard AWS and Hugging Face chain "
            "(environment, profile, role)"
        )
    if scheme == "s3" and not _BUCKET.match(rest.split("/")[0]):
        raise ValueError(f"{rest.split('/')[0]!r} is no bucket name (3 to 63 of a-z, 0-9, dots and dashes)")
    return url


def is_commit(revision: str) -> bool:
    """Whether `revision` is a full git commit."""
    return len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)  # noqa: PLR2004 - digits of a git commit
