"""What may be written down of a command line and of a message."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

REDACTED = "<redacted>"

# tokenizer is no token.
_SECRET = re.compile(r"key|token(?!i[sz]e)|secret|passw|credential|auth", re.IGNORECASE)
_MIN_SECRET_LENGTH = 8
"""Shorter values of secret variables (a "1", a "yes") would be struck out of ordinary text."""


def redact_command(argv: Sequence[str]) -> list[str]:
    """Return argv with the values of flags that speak of a key, token, secret, password or
    credential struck out, as `--flag value` and as `--flag=value`."""
    words: list[str] = []
    is_value_of_secret = False
    for word in argv:
        if word.startswith("--"):
            flag, equals, _ = word.partition("=")
            is_secret = bool(_SECRET.search(flag))
            words.append(f"{flag}={REDACTED}" if is_secret and equals else word)
            is_value_of_secret = is_secret and not equals
        else:
            words.append(REDACTED if is_value_of_secret else word)
    return words


def secret_values(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the values of the variables whose names speak of a secret."""
    return [
        value
        for name, value in environment.items()
        if len(value) >= _MIN_SECRET_LENGTH and _SECRET.search(name)
    ]


def strike_out(text: str, secrets: Sequence[str]) -> str:
    """Return text without the secrets, wherever they came in."""
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    return text
