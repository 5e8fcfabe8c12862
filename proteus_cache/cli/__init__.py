"""The command line. Commands parse, call one function and print; torch is not imported before it is needed."""

import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line. Ctrl-C before a command has begun, while this is still imported, is one line too."""
    try:
        from proteus_cache.cli.app import app

        app(prog_name="proteus-cache")
    except SystemExit as leaving:
        from proteus_cache.processes import leave_rank

        leave_rank(leaving.code)
        raise
    except KeyboardInterrupt:
        forget_interruption()
        sys.stderr.write("proteus-cache: interrupted; nothing was begun\n")
        sys.exit(1)
    sys.exit(0)


def forget_interruption() -> None:
    """Keep the exit status ours.

    When Ctrl-C hits code that runs from a string, as in the making of a dataclass, `python -m` remembers it and in the
    end kills itself with SIGINT, whatever status was asked for. The next string that is run makes it forget.
    """
    exec("")
