"""Run a command in a terminal of its own and save what is on the screen at the end as an SVG.

    pip install pyte
    python docs/capture_terminal.py docs/demo-terminal.svg proteus-cache demo

The picture shows what the command printed and nothing else; progress bars that it removed are gone.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import shlex
import struct
import sys
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

ROWS = 60


def main() -> int:
    """Run, save, and return the command's exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("svg", type=Path)
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    screen, status = run(arguments.command, arguments.columns)
    title = shlex.join(arguments.command)
    save(screen, title, arguments.svg)
    return status


def run(command: list[str], columns: int) -> tuple[pyte.Screen, int]:
    """The screen when the command has ended, and its exit status."""
    screen = pyte.Screen(columns, ROWS)
    stream = pyte.ByteStream(screen)
    child, terminal = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execvp(command[0], command)
    ioctl(terminal, TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not data:
            break
        stream.feed(data)
    return screen, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def save(screen: pyte.Screen, title: str, path: Path) -> None:
    """Draw the screen."""
    console = Console(record=True, width=screen.columns, file=open(os.devnull, "w"))  # noqa: SIM115  # a sink
    console.print(Text(f"$ {title}", style="bold"))
    used = max((row for row in range(screen.lines) if screen.display[row].strip()), default=-1)
    for row in range(used + 1):
        line = Text()
        for column in range(len(screen.display[row].rstrip())):
            cell = screen.buffer[row][column]
            colour = None if cell.fg == "default" else cell.fg.replace("bright", "bright_")
            line.append(cell.data, Style(color=colour, bold=cell.bold, italic=cell.italics))
        console.print(line, overflow="crop", no_wrap=True)
    # Without the fonts that rich would load from the net.
    path.write_text(re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title=title), flags=re.S), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
