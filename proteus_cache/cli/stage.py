"""A command as a stage of a pipeline: `python -m proteus_cache.cli.stage COMMAND ...`.

It ends when the pipeline is gone, and leaves the last words of an interruption to it.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from proteus_cache.processes import follow_parent


def main() -> NoReturn:
    """Run the command line."""
    follow_parent()
    try:
        from proteus_cache.cli import terminal
        from proteus_cache.cli.app import app

        with terminal.as_stage():
            app(prog_name="proteus-cache")
    except KeyboardInterrupt:
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
