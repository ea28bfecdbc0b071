"""Classification and formatting of exceptions for the command line, and conversion of library errors to ValueError.

This module imports only the standard library, because the command line needs it before any heavy import.
"""

import errno
import opcode
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

_RAISE = bytes([opcode.opmap["RAISE_VARARGS"]])
_TERMINAL = re.compile("\x1b\\[[0-9;]*[A-Za-z]")  # colour escape sequences, which torch puts into messages
_MAX_CHARACTERS = 300  # characters kept of another library's message
# Parts of out-of-memory messages of torch (CPU and GPU), the system's dynamic loader and the C++ library.
_NO_MEMORY = (
    "out of memory",
    "allocate memory",
    "failed to map segment",
    "bad_alloc",
    "unable to mmap",
    "size calculation overflowed",
)


def _innermost(error: BaseException) -> TracebackType | None:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place


def on_purpose(error: BaseException) -> bool:
    """Return whether the error was raised deliberately, with a message written for a reader.

    That is the case if a ``raise`` statement raised it, or if it comes from efface's C++ core, whose messages begin
    with a backtick. An error without a traceback counts as deliberate. Errors that the interpreter or another
    extension raises, such as ``'NoneType' object is not iterable``, are useful to a developer but not to a user.
    """
    place = _innermost(error)
    if place is None or str(error).startswith("`"):
        return True
    return place.tb_frame.f_code.co_code[place.tb_lasti :][:1] == _RAISE


def out_of_memory(error: BaseException) -> bool:
    """Return whether the error means that the host or a device ran out of memory."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    words = str(error).lower()
    return isinstance(error, (RuntimeError, OSError, ImportError)) and any(word in words for word in _NO_MEMORY)


def one_line(text: str) -> str:
    """Return a text as one line without terminal escapes; other unprintable characters are written as escapes."""
    words = " ".join(_TERMINAL.sub("", text).split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in words)


def in_words(error: BaseException) -> str:
    """Return the message of an error on one line, preceded by the name of its type if that adds information.

    The type is left out for ValueError, OSError and ImportError with their subclasses, and for TypeError, RuntimeError
    and Exception. An OSError about a file is shown as the file name and the system's message.
    """
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return one_line(f"{str(error.filename)!r}: {error.strerror}")
    said = one_line(str(error))
    shown_without_type = (ValueError, OSError, ImportError)
    if isinstance(error, shown_without_type) or type(error) in (TypeError, RuntimeError, Exception):
        return said or type(error).__name__
    return f"{type(error).__name__}: {said}".removesuffix(": ")


@contextmanager
def reading(what: str, expected: str, remedy: str = "get the file again") -> Iterator[None]:
    """Convert errors that a library raises while it reads user input, such as a file, into ValueError.

    Errors raised by efface's own code pass unchanged. So do errors of the system: a missing file, missing permission,
    too little memory, a missing package.

    Args:
        what: name of the input in the message.
        expected: what the input should be.
        remedy: what the user can do.

    Raises:
        ValueError: if the library raised an error. The message contains the three arguments and the library's message.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        place = _innermost(error)
        ours = place is not None and str(place.tb_frame.f_globals.get("__name__")).startswith("efface.")
        system_error = isinstance(error, OSError) and error.errno != errno.EINVAL
        if ours or system_error or out_of_memory(error):
            raise
        said = in_words(error)
        said = said if len(said) <= _MAX_CHARACTERS else f"{said[:_MAX_CHARACTERS]}…"
        raise ValueError(f"{what}: expected {expected}, got something else ({said}); {remedy}") from error
