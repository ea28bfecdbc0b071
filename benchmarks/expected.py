"""The time expected on a GPU, computed from shapes: ``python -m benchmarks expected``. Nothing here is measured.

The model covers one forward and backward call in bf16 on the Triton backend, with the chunks that the loss chooses for
the card's memory: ``linear_sequence_loss`` with NPO, or ``linear_distribution_loss`` (the KL retain term) with a live
reference. GEMMs run at an assumed rate, and all other work moves bytes at an assumed rate. Nothing overlaps, and hits
in a cache between two reads are not subtracted. The model leaves out instruction time beyond the bytes, and GEMM tiles
that do not fill the last wave. Launches take no time here, but small batches wait for them in practice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from efface_kernels import default_chunk_rows, logits_budget, one_chunk_is_smaller, shares_workspace
from efface_kernels.linear_loss.chunks import Chunk, largest_piece, plan_pieces, plan_rows, plan_sequences

KL = "KL, live"
MODES = ("live", "cached", "frozen, cached", KL)
HALF, SINGLE = 2, 4  # bytes of a bf16 and of an fp32 number


@dataclass(frozen=True)
class Card:
    """The assumed properties of a GPU."""

    name: str
    tflops: float  # of a large bf16 GEMM with cuBLAS
    terabytes: float  # memory bandwidth, per second
    memory: int

    def milliseconds(self, flop: float = 0.0, moved: float = 0.0) -> float:
        """Return the time of ``flop`` operations followed by a transfer of ``moved`` bytes."""
        return 1e3 * (flop / (1e12 * self.tflops) + moved / (1e12 * self.terabytes))


CARDS = (Card("H100", 750.0, 3.0, 79 << 30), Card("H200", 780.0, 4.3, 139 << 30))


@dataclass(frozen=True)
class HeadShape:
    """A batch of N label rows in sequences of equal length, and a head (V, D)."""

    name: str
    hidden_size: int
    vocabulary: int
    rows: int = 8192
    length: int = 32


SHAPES = (
    HeadShape("Llama-3.2-1B", 2048, 128256),
    HeadShape("Llama-3.2-3B", 3072, 128256),
    HeadShape("Llama-2-7B", 4096, 32000),
    HeadShape("Phi-1.5", 2048, 51200),
)


@dataclass(frozen=True)
class Expected:
    """The work of one call.

    Attributes:
        chunks: (n,) rows of each piece of logits.
        gemms: number of GEMMs.
        flop: floating-point operations of the GEMMs.
        moved: bytes moved other than operands and results of GEMMs, by the operation that moves them.
        launches: kernels of the forward and backward call, by the operation that launches them.
    """

    chunks: tuple[int, ...]
    gemms: int
    flop: float
    moved: dict[str, int]
    launches: dict[str, int]


def plan(
    shape: HeadShape, mode: str, card_memory: int | None, chunk_rows: int | None = None
) -> tuple[list[Chunk], bool]:
    """Return the chunks of the call, and whether the logits of both models use the same workspace in turn."""
    n, d, v = shape.rows, shape.hidden_size, shape.vocabulary
    budget = logits_budget("cuda", card_memory)
    if mode == KL:  # fp32 logits of both models at the same time
        rows = chunk_rows or default_chunk_rows("cuda", v, SINGLE, total_bytes=card_memory)
        if chunk_rows is None and n > rows and one_chunk_is_smaller(n, rows, (v, d), lambda r: 2 * r * v * SINGLE):
            rows = n
        return plan_pieces(n, rows), False

    def in_turn(rows: int) -> bool:
        return mode == "live" and shares_workspace("cuda", 2 * rows * v * HALF, budget)

    def logits_bytes(rows: int) -> int:
        return rows * v * HALF * (2 if mode == "live" and not in_turn(rows) else 1)

    rows = chunk_rows or default_chunk_rows("cuda", v, HALF, total_bytes=card_memory)
    trained = mode != "frozen, cached"
    if chunk_rows is None and trained and n > rows and one_chunk_is_smaller(n, rows, (v, d), logits_bytes):
        rows = n
    offsets = [*range(0, n, shape.length), n]
    chunks = plan_sequences(offsets, rows) if trained else plan_rows(len(offsets) - 1, n, rows)
    return chunks, in_turn(largest_piece(chunks))


def expected(shape: HeadShape, mode: str, card_memory: int | None, chunk_rows: int | None = None) -> Expected:
    """Return the work for one of ``MODES``: live reference, cached reference, cached with a frozen head, or KL."""
    chunks, in_turn = plan(shape, mode, card_memory, chunk_rows)
    n, d, v = shape.rows, shape.hidden_size, shape.vocabulary
    pieces = [stop - start for chunk in chunks for start, stop in chunk.pieces]
    kl, trained, count = mode == KL, mode != "frozen, cached", len(pieces)
    live = kl or mode == "live"
    gemms = 2 + live + trained  # Z, P W; Z of the reference; dW
    logits = n * v * HALF
    moved = {
        # Two sweeps, and the second also writes. A row of 128256 bf16 logits is 250 KiB, and about a thousand rows are
        # processed at a time. That exceeds the cache, so both sweeps read memory.
        "row pass": 0 if kl else 3 * logits,
        "reference row pass": logits if mode == "live" else 0,
        # The fp32 logits of both models are read twice, and P is written in bf16. Of the operands and results of the
        # GEMMs, only the extra bytes of fp32 logits over bf16 ones count.
        "distribution pass": n * v * (2 * 2 * SINGLE + HALF) if kl else 0,
        "fp32 logits": n * v * 2 * (SINGLE - HALF) if kl else 0,
        # Extra bytes of the GEMM that accumulates dW, compared with a bf16 result: the fp32 sum is written by the first
        # chunk, and read and written by the others.
        "sum of dW": (2 * count - 1) * v * d * SINGLE - count * v * d * HALF if trained and count > 1 else 0,
        # Conversion of the fp32 sum to bf16. With one chunk and an upstream scalar of 1, the gradient is left as it is.
        "finish of dW": v * d * (SINGLE + HALF) if trained and count > 1 else 0,
        "finish of dh": 2 * n * d * HALF,
        "f h": 2 * n * d * HALF if trained else 0,
    }
    launches = {
        "GEMM": gemms * count,
        "row pass": 0 if kl else count * (2 if in_turn else 1),
        "distribution pass": count if kl else 0,
        # copies of a piece's results into those of the batch: log-probabilities of each model, or divergence and
        # entropy
        "keep": count * (2 if live else 1),
        "sequence loss": 0 if kl else len(chunks),
        "c = -w": len(chunks) if kl else 0,
        "f = -c": len(chunks),
        "f h": count if trained else 0,
        "loss": 2 if kl else 1,  # the sum of the terms; KL multiplies them by weights first
        "finish of dh": 2,  # f times the upstream scalar, then P W times the result
        "finish of dW": 1 if trained else 0,
    }
    return Expected(tuple(pieces), gemms * count, gemms * 2.0 * n * d * v, moved, launches)


HEADINGS = (
    "card, head, reference",
    "chunks",
    "GEMMs, ms",
    "passes",
    "sum of dW",
    "finish",
    "other",
    "sum",
    "x GEMMs",
    "launches",
)


def table(cards: Sequence[Card] = CARDS, shapes: Sequence[HeadShape] = SHAPES) -> list[list[str]]:
    """Return the rows of the table with ``HEADINGS``, in milliseconds."""
    cells = []
    for card in cards:
        for shape in shapes:
            for mode in MODES:
                found = expected(shape, mode, card.memory)
                gemms = card.milliseconds(flop=found.flop)
                ms = {name: card.milliseconds(moved=moved) for name, moved in found.moved.items()}
                passes = sum(ms[name] for name in ("row pass", "reference row pass", "distribution pass"))
                finish, other = ms["finish of dW"] + ms["finish of dh"], ms["f h"] + ms["fp32 logits"]
                parts = [gemms, passes, ms["sum of dW"], finish, other]
                chunks = f"{len(found.chunks)} of {max(found.chunks)}"
                size = f"{card.name}, {shape.hidden_size} x {shape.vocabulary}, {mode}"
                figures = [f"{part:.2f}" for part in (*parts, sum(parts))]
                cells.append([size, chunks, *figures, f"{sum(parts) / gemms:.2f}", str(sum(found.launches.values()))])
    return cells


MEMORY_HEADINGS = ("memory of the card, head", "chunks", "logits", "fp32 sum of dW", "above inputs and gradients")


def memory_table(shapes: Sequence[HeadShape] = SHAPES) -> list[list[str]]:
    """Return the rows of the table with ``MEMORY_HEADINGS``: peak MiB of a call with a live reference."""
    cells = []
    for memory in (24 << 30, *(card.memory for card in CARDS)):
        for shape in shapes:
            chunks, in_turn = plan(shape, "live", memory)
            v, d, rows = shape.vocabulary, shape.hidden_size, largest_piece(chunks)
            logits = rows * v * HALF * (1 if in_turn else 2)
            total = v * d * SINGLE if len(chunks) > 1 else 0
            # After the last chunk the logits are freed, and the bf16 gradient is allocated in addition to the sum.
            above = max(logits + total - v * d * HALF, total) if total else logits
            sizes = [str(round(size / (1 << 20))) for size in (logits, total, above)]
            name = f"{memory >> 30} GiB, {d} x {v}"
            cells.append([name, f"{len(chunks)} of {rows}", *sizes])
    return cells


def assumptions() -> str:
    """Return the assumptions of the table in a sentence."""
    cards = "; ".join(
        f"{card.name}: {card.tflops:.0f} TFLOP/s, {card.terabytes:g} TB/s, {card.memory >> 30} GiB" for card in CARDS
    )
    rows, length = SHAPES[0].rows, SHAPES[0].length
    return f"N = {rows} label rows in sequences of {length}, bf16, NPO or KL, upstream scalar 1. {cards}."
