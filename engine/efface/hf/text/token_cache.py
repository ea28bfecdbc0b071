"""The token cache: token stores in memory-mapped Arrow files, found by the content of what they were made of.

A file is an Arrow stream, which any reader of Arrow takes, and behind it a trailer: the rows taken and those of the
data, and a digest of the key and of all bytes before it. A file whose digest does not fit is never read.
"""

import hashlib
import json
import os
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
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
from efface.files import written_file

FORMAT = 2  # part of every key: raise it when the same input makes other tokens, or the file another layout
FEATURES = datasets.Features(
    # Large: the offsets are int64, as the packer reads them.
    {"input_ids": datasets.LargeList(datasets.Value("int32")), "label_start": datasets.Value("int64")}
)
_SCHEMA = FEATURES.arrow_schema
_COUNTS = struct.Struct("<qq")  # rows taken, rows of the data; -1 where not known
_DIGEST_BYTES = 16
_READ_BYTES = 1 << 20


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
    """
    try:
        path = cache_folder(cache_dir) / "tokens" / f"{key}.arrow"
        if path.exists():
            try:
                return read(path)
            except ValueError as error:
                warnings.warn(f"token cache: {str(path)!r} is damaged ({error}); it is made anew", stacklevel=3)
                path.unlink(missing_ok=True)
        write(path, *chunks())
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

    Raises:
        ValueError: a byte that is not as it was written, or a file under another name.
        OSError: a file that cannot be read.
    """
    with path.open("rb") as file:
        whole = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
        if whole < _COUNTS.size:
            raise ValueError("it is cut off")
        expected = _digest_of(file, path.stem, whole)
        if file.read() != expected:
            raise ValueError("its checksum does not fit")
        file.seek(whole - _COUNTS.size)
        rows, of = _COUNTS.unpack(file.read(_COUNTS.size))
    table = datasets.Dataset.from_file(str(path)).data
    columns = (table.column(name).chunks for name in FEATURES)
    chunks = (_views(ids, starts) for ids, starts in zip(*columns, strict=True))
    return TokenStore(chunks, None if rows < 0 else Taken(rows, of))


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


def write(path: Path, chunks: Iterable[Chunk], taken: Taken | None = None) -> None:
    """Write chunks to a file as they come, a record batch each; the file appears whole or not at all.

    Args:
        path: the file, which has the name of its key.
        chunks: of the store.
        taken: which rows they are of.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    with written_file(path, durable=False) as partial:  # its digest tells a damaged one
        with pa.OSFile(str(partial), "wb") as sink, ArrowWriter(features=FEATURES, stream=sink) as writer:
            for ids, offsets, starts in chunks:
                sequences = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(ids))
                table = pa.Table.from_arrays([sequences, pa.array(starts)], schema=_SCHEMA)
                writer.write_table(table, writer_batch_size=max(len(starts), 1))
            writer.finalize()
        with partial.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(_COUNTS.pack(*(taken or (-1, -1))))
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
