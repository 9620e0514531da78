"""Errors that a user can fix, in at most two lines, and output streams that may close early."""

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO


class UserError(Exception):
    """An error that the user can fix. run_main prints its message without a traceback."""


class _Output:
    """A text stream that fails at most once, when it is closed or its disk is full.

    goes_on   after a failure, silently drop all further output; otherwise end the script
    """

    def __init__(self, stream: TextIO, goes_on: bool) -> None:
        self._stream, self._goes_on = stream, goes_on
        # a notebook's stream has no reconfigure()
        if hasattr(stream, "reconfigure") and stream.errors != "backslashreplace":
            stream.reconfigure(errors="replace")  # "?" for characters that cp1252 cannot encode

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, method: Callable[..., Any], *args: str) -> None:
        try:
            method(*args)
        except OSError as e:
            with suppress(OSError):  # so that flushing the buffer does not fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if self._goes_on:
                return
            if e.errno in (errno.EPIPE, errno.EINVAL):  # a closed pipe; EINVAL on Windows
                sys.exit(141)  # as after SIGPIPE
            raise UserError(
                f"the output cannot be written: {e.strerror}.\nFree some space, or write elsewhere."
            ) from None


def user_message(e: Exception) -> str:
    """Return what to print instead of a traceback; "" if the error is a bug."""
    if isinstance(e, OSError) and e.filename is not None:  # such as a path that is too long
        return f"{e.filename} cannot be used: {e.strerror}.\nChoose another path."
    return str(e) if isinstance(e, UserError) else ""


def run_main(main: Callable[[], None], goes_on: bool = False) -> None:
    """Run a script's main(). Exit with code 2 on a UserError, with 130 on Ctrl-C.

    goes_on   finish even if stdout is closed or its disk is full
    """
    streams = sys.stdout, sys.stderr
    # a stream is None if the script was started without it
    out, err = (stream or open(os.devnull, "w") for stream in streams)
    sys.stdout, sys.stderr = _Output(out, goes_on), _Output(err, goes_on=True)
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as e:
        if not (message := user_message(e)):
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    finally:
        for stream in (sys.stderr, sys.stdout):
            with suppress(UserError, SystemExit):
                stream.flush()  # a failure at interpreter exit would change the exit code
        sys.stdout, sys.stderr = streams
