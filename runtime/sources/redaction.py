"""Keeping passwords out of what is printed, logged and written about a source."""

from __future__ import annotations

import re

# Up to the last @: a password may hold a slash, a colon or another @. One slash, because a path has its second one
# taken away; two characters before the colon, because one is a drive of Windows.
_USER_AND_PASSWORD = re.compile(r"(?<=..:/)(/?).*@", re.DOTALL)
# user=admin&pwd=secret in an address, user-pw=secret in a pipeline; names such as api_key or accessToken count too.
_NAMED_SECRET = re.compile(
    r"""([\w-]*(?:pass|passwd|password|passphrase|pas|pwd|pw|token|key|secret|auth)\s*=\s*)("[^"]*"|'[^']*'|[^&\s]*)""",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """An address, a pipeline or what was meant as one, with *** for the user, the password and other secrets."""
    return _NAMED_SECRET.sub(r"\1***", _USER_AND_PASSWORD.sub(r"\1***@", text))
