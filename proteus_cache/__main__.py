"""`python -m proteus_cache`: the same as the command `proteus-cache`."""

from proteus_cache.cli import main

if __name__ == "__main__":
    main()
