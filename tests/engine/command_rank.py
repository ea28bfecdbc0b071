"""One rank of a command, started by torchrun; fails if the command leaves threads that could hang the exit."""

import sys

from helpers import no_thread_left

from efface.cli.main import main

if __name__ == "__main__":
    code = main(sys.argv[1:])
    no_thread_left()
    sys.exit(code)
