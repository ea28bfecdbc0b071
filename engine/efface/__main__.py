"""``python -m efface`` is the command ``efface``."""

import sys

from efface.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
