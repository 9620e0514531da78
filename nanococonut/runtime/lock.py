"""A lock on a folder. It ends with its process, however that ends."""

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

LOCK = ".lock"  # stays when the lock ends: to delete it is a race


def lock_folder(folder: Path) -> IO[str]:
    """Lock a folder until the returned file is closed, at the latest by the end of the process.

    Raise UserError with the holder's name if another process, or this one, holds the lock.
    """
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            # a byte after the text: nobody else can read a locked one
            os.lseek(file.fileno(), 1 << 20, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as e:
        if e.errno not in (errno.EAGAIN, errno.EACCES):
            print(f"{folder} cannot be locked ({e.strerror}): start no second run there")
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
