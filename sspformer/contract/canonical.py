"""One spelling for every value: the bytes that are hashed and signed.

Canonical JSON here is UTF-8, keys sorted by code point, no white space, no escapes but those that JSON requires, floats
in Python's shortest form that reads back equal. Numbers that JSON cannot carry (NaN, infinities) are refused.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sspformer.contract.errors import Code, Refused

_MAX_DEPTH = 32
_READ_BYTES = 1 << 20


def canonical_bytes(obj: object) -> bytes:
    """Encode a value of dicts with string keys, lists, tuples, strings, ints, finite floats, booleans and None.

    Raises:
        Refused: E-FORMAT when the value holds anything else, or is nested more than 32 deep.
    """
    _check(obj, 0)
    try:
        text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8")
    except ValueError as error:  # a lone surrogate, or an int of more digits than Python will print
        raise _refused(f"a value has no canonical form ({type(error).__name__})") from None


def parse(data: bytes, what: str, *, max_bytes: int) -> Any:
    """Read JSON strictly: no repeated keys, no NaN, no infinities, bounded in size and depth.

    Args:
        data: the bytes to read.
        what: name of the thing, for the refusal.
        max_bytes: size above which the bytes are not read at all.

    Raises:
        Refused: E-FORMAT.
    """
    if len(data) > max_bytes:
        raise _refused(f"{what} has {len(data)} bytes, more than the {max_bytes} allowed")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        _check(value, 0)
    except (ValueError, RecursionError):
        raise _refused(f"{what} is not strict JSON") from None
    except Refused:
        raise _refused(f"{what} holds a value that has no canonical form") from None
    return value


def digest(data: bytes) -> str:
    """Return "sha256:" and 64 hexadecimal digits."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """Return the digest of a file's bytes, read in pieces.

    Raises:
        OSError: the file cannot be read.
    """
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            hasher.update(piece)
    return "sha256:" + hasher.hexdigest()


def _check(obj: object, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise _refused(f"a value is nested more than {_MAX_DEPTH} deep")
    if obj is None or isinstance(obj, (str, bool, int)):
        return
    if isinstance(obj, float):
        if obj != obj or obj in (float("inf"), float("-inf")):
            raise _refused("NaN and infinities have no canonical form")
        return
    if isinstance(obj, dict):
        for key, value in obj.items():
            if not isinstance(key, str):
                raise _refused(f"a key is {type(key).__name__}, not a string")
            _check(value, depth + 1)
        return
    if isinstance(obj, (list, tuple)):
        for value in obj:
            _check(value, depth + 1)
        return
    raise _refused(f"a value is {type(obj).__name__}, which has no canonical form")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is repeated")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _refused(what: str) -> Refused:
    return Refused(Code.FORMAT, f"{what}.", "Send plain JSON values as this version of the software writes them.")
