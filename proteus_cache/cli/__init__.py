"""The command line. Commands parse, call one function and print; torch is not imported before it is needed."""

from proteus_cache.cli.app import main

__all__ = ["main"]
