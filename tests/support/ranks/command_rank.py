"""One rank of a command, started by torchrun. It fails if the command leaves threads that could hang the exit."""

import sys

from efface.cli.main import main
from support.helpers import no_thread_left

if __name__ == "__main__":
    code = main(sys.argv[1:])
    no_thread_left()
    sys.exit(code)
