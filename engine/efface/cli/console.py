"""Where commands speak: results on standard output, what happens meanwhile on standard error."""

from rich.console import Console

PIPE_WIDTH = 160


def open_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console; in a pipe, which has no width of its own, it is wide enough for every table."""
    console = Console(stderr=stderr, quiet=quiet)
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    return console
