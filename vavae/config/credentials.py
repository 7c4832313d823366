"""Credentials in URLs: no configuration carries any, for it is written down in many places."""

import re

# A colon before the "@" of a URL means a password, which may hold slashes; not so in S3's access points (arn:...) and
# behind a port.
_PASSWORD = re.compile(r"//(?!arn:)[^/@:]*:(?!\d+(/|$))[^@]*@")
_SECRET_QUERY = re.compile(
    r"[?&][^=&]*(signature|credential|secret|token|password|sig|key|accesskeyid)=", re.IGNORECASE
)

REFUSAL = (
    "a URL with credentials in it: take them out, they belong into the environment, a profile (storage.profile) or the "
    "machine's role"
)


def has_credentials(text: str) -> bool:
    """Return whether a text looks like a URL with a password or a signed query."""
    return bool(_PASSWORD.search(text) or _SECRET_QUERY.search(text))
