"""A lock on a run's folder. It ends with the process that holds it, even if that is killed."""

import errno
import os
import socket
import time
from pathlib import Path
from typing import IO

from nanococonut.runtime.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

LOCK = ".lock"  # never deleted, because another process may just be opening it


def lock_folder(folder: Path) -> IO[str]:
    """Lock a folder until the returned file is closed or the process ends.

    Raise UserError, which names the holder, if another process or this one has locked it already.
    """
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            # a byte after the text, because nobody else can read a locked byte
            os.lseek(file.fileno(), 1 << 20, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as e:
        if e.errno not in (errno.EAGAIN, errno.EACCES):
            print(f"{folder} cannot be locked ({e.strerror}): do not start a second run there")
            return file
        file.seek(0)
        holder = file.read() or "another process"
        file.close()
        raise UserError(
            f"--out_dir {folder} is in use by {holder}.\n"
            "Wait for that run or end it, or choose another --out_dir."
        ) from None
    file.truncate(0)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}")
    file.flush()
    return file
