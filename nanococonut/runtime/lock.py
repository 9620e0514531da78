"""A lock on a run's folder. It ends with the process that holds it, even if that is killed."""

import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from nanococonut.runtime.errors import UserError


def lock_folder(folder: Path) -> FileLock:
    """Lock a folder until release() is called on the returned lock or the process ends.

    Raise UserError that names the holder if another process, or this one, has locked it already.
    """
    lock = FileLock(folder / ".lock")
    # a file of its own, because Windows lets nobody else read a locked one
    holder_path = folder / ".lock_holder"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        is_known = holder_path.exists()
        holder = holder_path.read_text(encoding="utf-8") if is_known else "another process"
        raise UserError(
            f"--out_dir {folder} is in use by {holder}.\n"
            "Wait for that run or end it, or choose another --out_dir."
        ) from None
    except OSError as e:  # some network file systems have no locks
        print(f"{folder} cannot be locked ({e.strerror}): do not start a second run there")
        return lock
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = f"process {os.getpid()} on {socket.gethostname()}, started {started}"
    holder_path.write_text(holder, encoding="utf-8")
    return lock
