# Types of the extension module; its documentation is in the docstrings of module.cpp. Installed as the package
# efface_native-stubs.
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Backend: TypeAlias = Literal["best", "portable", "avx2", "avx512", "neon"]
_Chunk: TypeAlias = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]
_Floats: TypeAlias = NDArray[np.float32] | NDArray[np.float64]

class _Class(type): ...  # pybind11's metaclass

class TokenStore(metaclass=_Class):
    def __init__(self, name: str, chunks: Iterable[_Chunk]) -> None: ...
    def __len__(self) -> int: ...

class Logits(metaclass=_Class):
    def __init__(
        self,
        address: int,
        dtype: str,
        rows: int,
        vocabulary: int,
        stride: int,
        softcap: float = 0.0,
        residual: int = 0,
    ) -> None: ...

def measure(
    stores: Sequence[TokenStore],
    roles: NDArray[np.int8],
    sequences: NDArray[np.int64],
    *,
    share: bool = False,
    last_tokens: bool = True,
) -> tuple[int, int, int, int, int]: ...
def pack(
    stores: Sequence[TokenStore],
    roles: NDArray[np.int8],
    sequences: NDArray[np.int64],
    storage: NDArray[np.int64],
    *,
    share: bool = False,
    last_tokens: bool = True,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]: ...
def prefix_lengths(store: TokenStore, prefix: NDArray[np.int32]) -> NDArray[np.int64]: ...
def pair_prefix_lengths(one: TokenStore, other: TokenStore) -> NDArray[np.int64]: ...
def plan_epoch(
    forget_lengths: NDArray[np.int64],
    retain_lengths: NDArray[np.int64],
    alternates: NDArray[np.int64],
    *,
    pairs_per_step: int,
    token_budget: int,
    shared_tokens: int,
    world_size: int,
    seed: int,
    epoch: int,
    retain_sampling: str,
    drop_last: bool,
) -> dict[str, Any]: ...
def row_pass(
    logits: Logits,
    targets: NDArray[np.int64],
    *,
    gradient: bool,
    logprobs: _Floats,
    reference_logits: Logits | None = None,
    reference_logprobs: _Floats | None = None,
    threads: int = 1,
    backend: _Backend = "best",
) -> None: ...
def distribution_pass(
    logits: Logits,
    reference_logits: Logits,
    targets: NDArray[np.int64],
    *,
    shift: float,
    into: Logits | None,
    divergence: _Floats,
    entropy: _Floats,
    threads: int = 1,
    backend: _Backend = "best",
) -> None: ...
def backends() -> list[str]: ...
def exp_in_place(values: NDArray[np.float32], backend: _Backend = "best") -> None: ...
def tanh_in_place(values: NDArray[np.float32], backend: _Backend = "best") -> None: ...
