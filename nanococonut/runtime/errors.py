"""Errors a user can fix: what is wrong, the value, what to do, in at most two lines."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake of the user. run_main prints the message without a traceback."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main(). Exit with code 2 on a UserError, with 130 on Ctrl-C."""
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` closed the pipe; the flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as e:  # a path that is too long, without permission, on a disk that is gone
        if e.filename is None:
            raise
        print(f"error: {e.filename} cannot be used: {e.strerror}.", file=sys.stderr)
        sys.exit(2)
