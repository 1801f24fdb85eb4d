"""Files that are whole or absent: what is written takes the place of the old file only when all of it is there."""

from __future__ import annotations

import csv
import errno
import io
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces `path` when the block ends, and leaves nothing behind where the block raises.

    It is written under a fresh, unpredictable name in the same folder, so processes that write to one path do not
    disturb each other: the last to finish stays. The file keeps the mode of the one it replaces, and a symbolic link
    keeps pointing at it. What is no regular file, such as /dev/stdout, is written to as it is.

    Args:
        path: of the file, in a folder that exists.

    Raises:
        OSError: the folder is missing or cannot be written to, or the disk is full; `path` is then as before.
    """
    target = Path(os.path.realpath(path))
    try:
        mode: int | None = target.stat().st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        with open(target, "wb") as file:
            yield file
        return
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name[:20]}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            # a new file has the mode that open would give it; mkstemp's is for its owner alone
            os.fchmod(file.fileno(), 0o666 & ~_umask() if mode is None else stat.S_IMODE(mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


def write_csv(path: str | Path, fields: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows under a header, whole or not at all.

    Raises:
        OSError: as `whole_file`.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(path) as file:
        file.write(text.getvalue().encode())


def _umask() -> int:
    # Linux tells it without changing it, which another thread would see
    with suppress(OSError):
        # the process's name, which need not be text, stands there too
        for line in Path("/proc/self/status").read_bytes().splitlines():
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def check_writable(name: str, path: str | Path) -> None:
    """Check before long work that a file can be written.

    Args:
        name: the argument that an error names.
        path: of the file.

    Raises:
        ValueError: its folder is missing, is no folder or cannot be written to, or the path is a folder.
    """
    target = Path(os.path.realpath(path))
    try:
        target.stat()
    except OSError as error:
        # what is absent is told by its folder
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise ValueError(
                f"{name}: expected a path that can be written to, got {str(path)!r}: {error.strerror}"
            ) from error
    if target.is_dir():
        raise ValueError(f"{name}: expected the path of a file, got the folder {str(path)!r}")
    if target.exists() and not target.is_file():
        return
    if not target.parent.is_dir():
        raise ValueError(f"{name}: expected a path in a folder that exists, got {str(path)!r}")
    try:
        # permissions alone do not tell: the system may refuse for reasons of its own
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"{name}: expected a path in a folder that can be written to, got {str(path)!r}: {error.strerror}"
        ) from error


def make_folder(name: str, folder: str | Path) -> None:
    """Make a folder before long work, and check that files can be written to it.

    Raises:
        OSError: it cannot be made.
        ValueError: it cannot be written to.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    check_writable(name, Path(folder) / "file")
