"""The token cache: token stores in memory-mapped Arrow files, keyed by a digest of their inputs.

A file is an Arrow stream, readable by any Arrow reader, followed by a trailer. The trailer contains the source of the
data, the number of rows used, the number of rows in the data, and a digest of the key and of all bytes before it. A
file with a wrong digest is never used.

The text can be recovered from the tokens. The files are therefore readable only by their user, and a file's name starts
with the digest of its data, so that all files of a data set can be found and removed; see
``efface.hf.text.cache_entries``.
"""

import hashlib
import json
import os
import struct
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import tokenizers
import transformers
import xxhash
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from efface.batching import TokenStore
from efface.batching.store import Chunk, Taken
from efface.files import private_folder, remove_leftovers, take_lock, written_file

FORMAT = 3  # part of every key: increase it if the same input gives other tokens, or if the file layout changes
TOKENS, REFERENCE, TAUGHT = "tokens", "reference.sqlite", "tiny"  # names in the cache folder
DIGITS = 32  # hexadecimal digits of a digest in a file name
FEATURES = datasets.Features(
    # LargeList, because the packer reads int64 offsets.
    {"input_ids": datasets.LargeList(datasets.Value("int32")), "label_start": datasets.Value("int64")}
)
_SCHEMA = FEATURES.arrow_schema
_COUNTS = struct.Struct("<qqq")  # bytes of the source before this; rows used and rows of the data, or -1 if unknown
_DIGEST_BYTES = 16
_READ_BYTES = 1 << 20
_LEFT_BEHIND = 3600  # seconds after which a partial file counts as a killed process's, on systems without file locks


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the cache folder.

    This is the first that is set of ``cache_dir``, ``$EFFACE_CACHE``, ``$XDG_CACHE_HOME/efface``, ``~/.cache/efface``.

    Raises:
        OSError: the user has no home folder.
    """
    given = cache_dir or os.environ.get("EFFACE_CACHE")
    if given:
        return Path(given).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "efface"
    except RuntimeError as error:
        raise OSError(str(error)) from error


def own_folder(name: str, cache_dir: str | Path | None = None) -> Path:
    """Create a folder in the cache that only the user can access, and return it.

    Raises:
        OSError: the folder cannot be created.
    """
    folder = private_folder(cache_folder(cache_dir) / name)
    with suppress(OSError):  # earlier versions created it accessible to all users
        folder.chmod(0o700)
    return folder


def stored(
    key: str,
    chunks: Callable[[], tuple[Iterable[Chunk], Taken | None]],
    cache_dir: str | Path | None = None,
    *,
    data: str = "",
    source: str = "",
) -> TokenStore:
    """Return the token store of a key from the cache; build it with ``chunks()`` if it is not there.

    The store is written to a temporary file that is then renamed, so killed or concurrent processes leave no partial
    file. A damaged file is removed and built again. If the folder is not writable, the tokens are kept in memory.

    Args:
        key: the result of ``digest`` for everything that the tokens depend on.
        chunks: returns the arrays of the store, chunk by chunk, and the numbers of rows used and available; called only
            if the store is not in the cache.
        cache_dir: see ``cache_folder``.
        data: digest of the data, by which ``efface cache`` finds the file.
        source: path or name of the data, for the same purpose.
    """
    try:
        folder = own_folder(TOKENS, cache_dir)
        path = folder / (f"{data[:DIGITS]}-{key}.arrow" if data else f"{key}.arrow")
        if path.exists():
            with suppress(OSError):
                os.utime(path)  # the modification time is the time of last use
            try:
                return read(path)
            except ValueError as error:
                warnings.warn(f"token cache: {str(path)!r} is damaged ({error}); it is built again", stacklevel=3)
                path.unlink(missing_ok=True)
        remove_leftovers(folder, seconds=_LEFT_BEHIND)
        write(path, *chunks(), source=source)
        return read(path)
    except OSError as error:
        warnings.warn(
            f"token cache: cannot use the folder ({error}), so tokens are kept in memory and built again in each run; "
            "set EFFACE_CACHE to a writable folder with space",
            stacklevel=3,
        )
        return TokenStore(*chunks())


def read(path: Path) -> TokenStore:
    """Verify a file's digest, and map the file into memory as a token store.

    The file stays locked, with a lock shared among readers, for the lifetime of the store.

    Raises:
        ValueError: the file is cut off or damaged, or was renamed.
        OSError: the file cannot be read.
    """
    with ExitStack() as stack:
        with suppress(OSError, ImportError):  # no file locks on this system
            if (handle := take_lock(path, shared=True)) is not None:
                stack.callback(os.close, handle)
        with path.open("rb") as file:
            whole = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
            if whole < _COUNTS.size:
                raise ValueError("it is cut off")
            expected = _digest_of(file, path.stem, whole)
            if file.read() != expected:
                raise ValueError("its checksum does not match")
            file.seek(whole - _COUNTS.size)
            _, rows, of = _COUNTS.unpack(file.read(_COUNTS.size))
        table = datasets.Dataset.from_file(str(path)).data
        columns = (table.column(name).chunks for name in FEATURES)
        chunks = (_views(ids, starts) for ids, starts in zip(*columns, strict=True))
        store = TokenStore(chunks, None if rows < 0 else Taken(rows, of))
        weakref.finalize(store, stack.pop_all().close)
    return store


def source_of(path: Path) -> str:
    """Return the source of a file's data; "" if it is unknown or the file is damaged."""
    with suppress(OSError, ValueError, struct.error), path.open("rb") as file:
        file.seek(-_COUNTS.size - _DIGEST_BYTES, os.SEEK_END)
        length, *_ = _COUNTS.unpack(file.read(_COUNTS.size))
        file.seek(-_COUNTS.size - _DIGEST_BYTES - length, os.SEEK_END)
        return file.read(length).decode() if length > 0 else ""
    return ""


def _digest_of(file: BinaryIO, key: str, count: int) -> bytes:
    """Return the digest of a key and of the next ``count`` bytes; damage goes undetected once in 2^128 cases."""
    state = xxhash.xxh3_128(key.encode())
    while count > 0 and (block := file.read(min(count, _READ_BYTES))):
        state.update(block)
        count -= len(block)
    return state.digest()


def _views(ids: pa.LargeListArray, starts: pa.Int64Array) -> Chunk:
    """Return the buffers of a record batch as NumPy arrays; pyarrow raises an error if that would need a copy."""
    return (
        ids.values.to_numpy(zero_copy_only=True),
        ids.offsets.to_numpy(zero_copy_only=True),
        starts.to_numpy(zero_copy_only=True),
    )


def write(path: Path, chunks: Iterable[Chunk], taken: Taken | None = None, *, source: str = "") -> None:
    """Write chunks to a file one at a time, each as a record batch; the complete file appears by atomic rename.

    Args:
        path: the file; its stem is the key, which the digest covers.
        chunks: chunks of the store.
        taken: numbers of rows used and available; None if unknown.
        source: path or name of the data.

    Raises:
        OSError: the folder is not writable, or is full.
    """
    origin = source.encode(errors="replace")
    with written_file(path, durable=False, private=True) as partial:  # no fsync: the digest detects damage
        with pa.OSFile(str(partial), "wb") as sink, ArrowWriter(features=FEATURES, stream=sink) as writer:
            for ids, offsets, starts in chunks:
                sequences = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(ids))
                table = pa.Table.from_arrays([sequences, pa.array(starts)], schema=_SCHEMA)
                writer.write_table(table, writer_batch_size=max(len(starts), 1))
            writer.finalize()
        with partial.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(origin + _COUNTS.pack(len(origin), *(taken or (-1, -1))))
            size = file.tell()
            file.seek(0)
            digest = _digest_of(file, path.stem, size)
            file.write(digest)


def digest(*parts: Any) -> str:
    """Return a cache key for JSON values; equal values give equal keys."""
    content = json.dumps([FORMAT, *parts], sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            state.update(block)
    return state.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of everything in a tokenizer that the tokens of a text depend on."""
    state = hashlib.sha256()
    for part in _tokenizer_content(tokenizer):
        state.update(part)
    return state.hexdigest()


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> Iterator[bytes]:
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    settings = [
        type(tokenizer).__name__,
        transformers.__version__,
        tokenizers.__version__,
        special,
        tokenizer.chat_template,
        getattr(tokenizer, "split_special_tokens", False),
    ]
    yield json.dumps(settings, sort_keys=True).encode()
    if tokenizer.is_fast:
        # The part before "added_tokens" is truncation and padding, which change with every call and are not used here.
        yield tokenizer.backend_tokenizer.to_str().partition('"added_tokens"')[2].encode()
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                yield path.name.encode() + b"\0" + path.read_bytes()
