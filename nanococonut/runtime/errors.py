"""Mistakes of the user's: one or two lines that say what was given, what is wanted, what to do."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. The message is shown as it is, without a traceback."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main(). A UserError ends it with its message and exit code 2, Ctrl-C with
    130."""
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough; nothing more can be said, at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
