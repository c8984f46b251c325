"""The command as it was typed, for reports: without the values of secret options and without secrets in addresses."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

HIDDEN: Final = "[redacted]"
_SECRET_OPTIONS: Final = ("--token",)
_SECRET_VARIABLES: Final = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "QTOOL_API_KEY")
_TOKEN: Final = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_IN_ADDRESS: Final = (
    (re.compile(r"(\w+://)[^/@\s]+@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(\w+://[^?\s]*\?).+"), rf"\1{HIDDEN}"),
)
_SHORTEST: Final = 6
"""A variable of fewer characters is no secret, and would be found in other words."""


def typed_command(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """`qtool` and its arguments, quoted for a shell."""
    secrets = [environment.get(name, "").strip() for name in _SECRET_VARIABLES]
    shown = _without_values(arguments)
    return shlex.join(["qtool", *(_hidden(each, [s for s in secrets if len(s) >= _SHORTEST]) for each in shown)])


def _without_values(arguments: Sequence[str]) -> Iterator[str]:
    previous = ""
    for argument in arguments:
        name, has_value, _ = argument.partition("=")
        if previous in _SECRET_OPTIONS:
            yield HIDDEN
        elif has_value and name in _SECRET_OPTIONS:
            yield f"{name}={HIDDEN}"
        else:
            yield argument
        previous = argument


def _hidden(argument: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        argument = argument.replace(secret, HIDDEN)
    argument = _TOKEN.sub(HIDDEN, argument)
    for pattern, replacement in _IN_ADDRESS:
        argument = pattern.sub(replacement, argument)
    return argument
