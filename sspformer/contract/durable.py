"""Files that are whole or absent: written under another name in the same folder, flushed, then renamed."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from sspformer.contract.errors import Code, Refused

SECRET_MODE = 0o600
PLAIN_MODE = 0o644


def write_file(path: Path, data: bytes, mode: int = PLAIN_MODE) -> None:
    """Replace a file's content so that a reader, or a restart after a crash, sees the old bytes or the new ones.

    Raises:
        OSError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask says
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_secret(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read (0600)."""
    write_file(path, data, SECRET_MODE)


def read_secret(path: Path, what: str) -> bytes:
    """Read a file that only its owner may read.

    Raises:
        Refused: E-STATE when it is missing, unreadable, or open to other users.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise Refused(
                    Code.STATE, f"{what} {path} may be read by other users (mode {mode:04o}).", f"Run: chmod 600 {path}"
                )
            return file.read()
    except OSError as error:
        raise Refused(
            Code.STATE,
            f"{what} {path} cannot be read ({error.strerror}).",
            "Give the folder that `init` made, as the user who made it.",
        ) from None


def make_private_folder(path: Path) -> None:
    """Make a folder that only its owner may enter (0700); its parents too when they are missing.

    A folder that is there already keeps its mode: it may be one that people share, and not ours to close.
    """
    if path.is_dir():
        return
    make_private_folder(path.parent)
    try:
        path.mkdir(mode=0o700)
        path.chmod(0o700)  # whatever the umask says
    except FileExistsError:
        if not path.is_dir():
            raise


def sync_folder(path: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
