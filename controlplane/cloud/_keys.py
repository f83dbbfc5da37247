"""Keys of providers: read once, from the environment or from a file that nobody else can read."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

from controlplane.cloud._values import CloudProvider

_LARGEST_KEY_BYTES = 8192


class ApiKey:
    """A key that shows itself to nobody who does not ask for it by name."""

    __slots__ = ("value",)

    def __init__(self, value: str) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "ApiKey(hidden)"

    def hide(self, text: str) -> str:
        """A text without the key in it."""
        return text.replace(self.value, "[key]")


def read_key(provider: CloudProvider, environment: Mapping[str, str]) -> ApiKey | str:
    """The key of a provider, or why there is none, for a person."""
    if provider.api_key_file is None:
        value = environment.get(provider.api_key_env, "").strip()
        where = provider.api_key_env
        if not value:
            return f"no key: set {provider.api_key_env}"
    else:
        where = str(provider.api_key_file)
        try:
            with open(provider.api_key_file, encoding="utf-8") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                if mode & 0o077:
                    return f"the key in {where} can be read by others: chmod 600 {where}"
                value = file.read(_LARGEST_KEY_BYTES).strip()
        except (OSError, UnicodeDecodeError) as error:
            return f"no key: {where} cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}"
        if not value:
            return f"no key: {where} is empty"
    # What a header cannot carry would be refused later, by a message that might quote it.
    if not value.isascii() or not value.isprintable() or " " in value:
        return f"the key in {where} is not one: it has spaces or characters that no key has"
    return ApiKey(value)
