"""Errors as users meet them: what is a message, what is a fault of ours, and what libraries say of files.

It imports the standard library alone: the command line needs it before anything heavy.
"""

import errno
import opcode
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

_RAISE = bytes([opcode.opmap["RAISE_VARARGS"]])
_TERMINAL = re.compile("\x1b\\[[0-9;]*[A-Za-z]")  # colours, as torch puts into messages
_MOST = 300  # letters of another library's message
# Of torch on CPUs and GPUs, the system's loader, and C++.
_NO_MEMORY = ("out of memory", "allocate memory", "failed to map segment", "bad_alloc", "unable to mmap")


def _innermost(error: BaseException) -> TracebackType | None:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place


def on_purpose(error: BaseException) -> bool:
    """Whether somebody wrote the message: a ``raise`` statement, or efface's C++ core, whose begin with a backtick.

    What Python and other extensions find wrong themselves, such as ``'NoneType' object is not iterable``, tells a
    reader of the code something, and a user nothing.
    """
    place = _innermost(error)
    if place is None or str(error).startswith("`"):
        return True
    return place.tb_frame.f_code.co_code[place.tb_lasti :][:1] == _RAISE


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine or a device had too little memory."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    words = str(error).lower()
    return isinstance(error, (RuntimeError, OSError, ImportError)) and any(word in words for word in _NO_MEMORY)


def one_line(text: str) -> str:
    """Return a text as one line that shows on a terminal as it is."""
    words = " ".join(_TERMINAL.sub("", text).split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in words)


def in_words(error: BaseException) -> str:
    """Return the message of an error in one line; with its type where the message says little without it."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return one_line(f"{str(error.filename)!r}: {error.strerror}")
    said = one_line(str(error))
    if isinstance(error, (ValueError, OSError)) or type(error) in (TypeError, ImportError, RuntimeError, Exception):
        return said or type(error).__name__
    return f"{type(error).__name__}: {said}".removesuffix(": ")


@contextmanager
def reading(what: str, expected: str, remedy: str = "get the file again") -> Iterator[None]:
    """Turn whatever a library raises over something that it reads for a user into a ValueError that says so.

    Errors of efface's own code pass as they are, and so do those of the machine: no such file, no permission, no
    memory, no package.

    Args:
        what: the file, as messages call it.
        expected: what it should be.
        remedy: what to do.

    Raises:
        ValueError: with the three, and what the library said.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        place = _innermost(error)
        ours = place is not None and str(place.tb_frame.f_globals.get("__name__")).startswith("efface.")
        of_the_machine = isinstance(error, OSError) and error.errno != errno.EINVAL
        if ours or of_the_machine or out_of_memory(error):
            raise
        said = in_words(error)
        said = said if len(said) <= _MOST else f"{said[:_MOST]}…"
        raise ValueError(f"{what}: expected {expected}, got something else ({said}); {remedy}") from error
