"""python -m attlas: the same as the command `attlas`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
