"""python -m fomoe_io: the command fomoe."""

import sys

from fomoe_io.commands import fomoe

if __name__ == "__main__":
    sys.exit(fomoe())
