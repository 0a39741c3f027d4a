"""Secrets that this process read: where they come from, and how they are kept out of what is stored and said.

A key comes from an environment variable, through :func:`read_secret`, and from nowhere else; what a server says goes
through :func:`cleaned` before anything is made of it.
"""

from __future__ import annotations

import os
import re
from typing import Any

from harness.core.errors import UserError

MARK = "[secret]"
SHORTEST = 8
"""Fewer characters, and mere letters, are words such as EMPTY, which an answer may well hold."""
_CREDENTIALS = re.compile(r"https?://([^/?#\s]*@|\S*[?&](api_?)?(key|token|secret|password)=)", re.IGNORECASE)
_known: set[str] = set()


def read_secret(variable: str, where: str) -> str:
    """The value of an environment variable, which :func:`cleaned` takes out of texts from now on; empty: not set.

    Raises:
        UserError: what is given is not a variable's name, or its value cannot be sent in a header.
    """
    check_variable(variable, where)
    value = os.environ.get(variable, "").strip()
    if not (value.isascii() and value.isprintable()):
        what = f"the value of the environment variable {variable} holds characters that no HTTP header can carry"
        raise UserError(where, what, f"Export it again, in plain ASCII: `export {variable}=...`.")
    _known.update(word for word in value.split() if len(word) >= SHORTEST and not word.isalpha())
    return value


def cleaned(value: Any) -> Any:
    """The same data, as of JSON, in which :data:`MARK` stands for every secret that was read."""
    if not _known:
        return value
    if isinstance(value, str):
        for secret in sorted(_known, key=len, reverse=True):
            value = value.replace(secret, MARK)
        return value
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    if isinstance(value, dict):
        return {cleaned(key): cleaned(item) for key, item in value.items()}
    return value


def check_variable(name: str, where: str) -> None:
    """Whether this can be the name of an environment variable; a key in its place would be stored.

    Raises:
        UserError: it is no such name; its text is not shown.
    """
    if not name or name in os.environ or re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        return
    what = "takes the name of an environment variable; what is given is none that is set, and may be the key itself"
    raise UserError(where, what, "Export the key, say as OPENAI_API_KEY, and give that name.")


def refuse_within(options: Any, where: str) -> None:
    """Refuse credentials in any address within options, also of what is not used: a plan keeps them all.

    Raises:
        UserError: naming the option, whose value is not shown.
    """
    if isinstance(options, str) and _CREDENTIALS.search(options):
        refuse_credentials(options, where, "OPENAI_API_KEY")
    inner = options.items() if isinstance(options, dict) else enumerate(options) if isinstance(options, list) else ()
    for key, value in inner:
        refuse_within(value, f"{where}{'' if where.endswith(' ') else '.'}{key}")


def refuse_credentials(address: str, where: str, variable: str) -> None:
    """Refuse a server's address with a user, a password or a query: it is stored and shown, and keys are neither.

    Raises:
        UserError: it has one; the address is not shown.
    """
    if not any(sign in address for sign in "@?#"):
        return
    what = "the address holds a user, a password or a query (@, ? or #); addresses are stored, and secrets never are"
    fix = f"Give the bare address, and the key in the environment: `export {variable or 'OPENAI_API_KEY'}=...`."
    raise UserError(where, what, f"{fix} For basic authentication its value is `Basic` and user:password in base64.")
