"""``python -m malmend`` is the command ``malmend``."""

import sys

from malmend.cli import main

if __name__ == "__main__":
    sys.exit(main())
