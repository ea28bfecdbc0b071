"""The token cache: token stores in memory-mapped Arrow files, found by the content of what they were made of.

A file is an Arrow stream, which any reader of Arrow takes, and behind it a trailer: where the data were from, the rows
taken and those of the data, and a digest of the key and of all bytes before it. A file whose digest does not fit is
never read.

Tokens say what the text was. So nobody but the user can read the files, and a file's name begins with the digest of
its data, by which they are found again to be removed; see ``efface.hf.text.cache_entries``.
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

FORMAT = 3  # part of every key: raise it when the same input makes other tokens, or the file another layout
TOKENS, REFERENCE, TAUGHT = "tokens", "reference.sqlite", "tiny"  # what is in the cache folder
DIGITS = 32  # of digests in names
FEATURES = datasets.Features(
    # Large: the offsets are int64, as the packer reads them.
    {"input_ids": datasets.LargeList(datasets.Value("int32")), "label_start": datasets.Value("int64")}
)
_SCHEMA = FEATURES.arrow_schema
_COUNTS = struct.Struct("<qqq")  # bytes of the source before it; rows taken, rows of the data, -1 where not known
_DIGEST_BYTES = 16
_READ_BYTES = 1 << 20
_LEFT_BEHIND = 3600  # seconds after which a file that nobody holds is of a killed process, where there are no locks


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return ``cache_dir``, ``$EFFACE_CACHE``, ``$XDG_CACHE_HOME/efface`` or ``~/.cache/efface``, the first there is.

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


def stored(
    key: str,
    chunks: Callable[[], tuple[Iterable[Chunk], Taken | None]],
    cache_dir: str | Path | None = None,
    *,
    data: str = "",
    source: str = "",
) -> TokenStore:
    """Return the token store of a key from the cache; make it of ``chunks()`` if it is not there.

    The file is written beside its place and moved there whole, so neither a killed process nor two at once leave a
    broken one. One that is broken all the same is removed and made anew. Where the folder cannot be written to, the
    tokens are kept in memory.

    Args:
        key: what ``digest`` returned for all that the tokens depend on.
        chunks: makes the arrays of the store, one chunk after another, and says which rows they are of; called only if
            they are not in the cache.
        cache_dir: see ``cache_folder``.
        data: digest of the data, to find all that was made of them.
        source: path or name of the data, likewise.
    """
    try:
        folder = private_folder(cache_folder(cache_dir) / TOKENS)
        with suppress(OSError):  # earlier versions let everybody look into it
            folder.chmod(0o700)
        path = folder / (f"{data[:DIGITS]}-{key}.arrow" if data else f"{key}.arrow")
        if path.exists():
            with suppress(OSError):
                os.utime(path)  # the time of its last use, by which old ones are told
            try:
                return read(path)
            except ValueError as error:
                warnings.warn(f"token cache: {str(path)!r} is damaged ({error}); it is made anew", stacklevel=3)
                path.unlink(missing_ok=True)
        remove_leftovers(folder, seconds=_LEFT_BEHIND)
        write(path, *chunks(), source=source)
        return read(path)
    except OSError as error:
        warnings.warn(
            f"token cache: cannot use the folder ({error}), so tokens are kept in memory and made anew in each run; "
            "set EFFACE_CACHE to a folder with space",
            stacklevel=3,
        )
        return TokenStore(*chunks())


def read(path: Path) -> TokenStore:
    """Map a file into memory as a token store, once all of its bytes are known to be those that were written.

    The file is locked, shared with other readers, as long as the store is there.

    Raises:
        ValueError: a byte that is not as it was written, or a file under another name.
        OSError: a file that cannot be read.
    """
    with ExitStack() as stack:
        with suppress(OSError, ImportError):  # without locks
            if (handle := take_lock(path, shared=True)) is not None:
                stack.callback(os.close, handle)
        with path.open("rb") as file:
            whole = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
            if whole < _COUNTS.size:
                raise ValueError("it is cut off")
            expected = _digest_of(file, path.stem, whole)
            if file.read() != expected:
                raise ValueError("its checksum does not fit")
            file.seek(whole - _COUNTS.size)
            _, rows, of = _COUNTS.unpack(file.read(_COUNTS.size))
        table = datasets.Dataset.from_file(str(path)).data
        columns = (table.column(name).chunks for name in FEATURES)
        chunks = (_views(ids, starts) for ids, starts in zip(*columns, strict=True))
        store = TokenStore(chunks, None if rows < 0 else Taken(rows, of))
        weakref.finalize(store, stack.pop_all().close)
    return store


def source_of(path: Path) -> str:
    """Return where the data of a file were from; "" where that is not known, or the file is damaged."""
    with suppress(OSError, ValueError, struct.error), path.open("rb") as file:
        file.seek(-_COUNTS.size - _DIGEST_BYTES, os.SEEK_END)
        length, *_ = _COUNTS.unpack(file.read(_COUNTS.size))
        file.seek(-_COUNTS.size - _DIGEST_BYTES - length, os.SEEK_END)
        return file.read(length).decode() if length > 0 else ""
    return ""


def _digest_of(file: BinaryIO, key: str, count: int) -> bytes:
    """Return the digest of a key and of the next ``count`` bytes; a damaged one is missed once in 2^128 times."""
    state = xxhash.xxh3_128(key.encode())
    while count > 0 and (block := file.read(min(count, _READ_BYTES))):
        state.update(block)
        count -= len(block)
    return state.digest()


def _views(ids: pa.LargeListArray, starts: pa.Int64Array) -> Chunk:
    """Return the buffers of a record batch as NumPy arrays; pyarrow refuses whatever needs a copy."""
    return (
        ids.values.to_numpy(zero_copy_only=True),
        ids.offsets.to_numpy(zero_copy_only=True),
        starts.to_numpy(zero_copy_only=True),
    )


def write(path: Path, chunks: Iterable[Chunk], taken: Taken | None = None, *, source: str = "") -> None:
    """Write chunks to a file as they come, a record batch each; the file appears whole or not at all.

    Args:
        path: the file, which has the name of its key.
        chunks: of the store.
        taken: which rows they are of.
        source: where these are from.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    origin = source.encode(errors="replace")
    with written_file(path, durable=False, private=True) as partial:  # its digest tells a damaged one
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
    """Return a key for JSON values: equal values, equal key."""
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
    """Return a digest of all that the tokens of a text depend on."""
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
        # Up to here stand truncation and padding, which change with every call and have no part in ours.
        yield tokenizer.backend_tokenizer.to_str().partition('"added_tokens"')[2].encode()
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                yield path.name.encode() + b"\0" + path.read_bytes()
