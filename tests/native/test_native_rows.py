"""Tests of the C++ row passes through their bindings: accuracy, every vector backend, invalid input. No torch."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import efface_native
import numpy as np
import pytest
from efface_native import Logits

BACKENDS = efface_native.backends()
STUB = Path(__file__).resolve().parents[2] / "bindings" / "efface_native.pyi"


def describe(
    array: np.ndarray, dtype: str | None = None, softcap: float = 0.0, residual: np.ndarray | None = None
) -> Logits:
    rows, vocabulary = array.shape
    stride, rest = array.strides[0] // array.itemsize, 0 if residual is None else residual.ctypes.data
    return Logits(array.ctypes.data, dtype or str(array.dtype), rows, vocabulary, stride, softcap, rest)


def bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; return the bits."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widened(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def naive(z: np.ndarray, target: int) -> tuple[float, np.ndarray]:
    shifted = z - z.max()
    p = np.exp(shifted) / np.exp(shifted).sum()
    p[target] -= 1
    return shifted[target] - np.log(np.exp(shifted).sum()), p


def test_the_portable_backend_is_always_there_and_best_is_one_of_them() -> None:
    assert BACKENDS[0] == "portable"
    with pytest.raises(ValueError, match="expected best, portable, avx2"):
        efface_native.exp_in_place(np.zeros(1, np.float32), "sse")


@pytest.mark.parametrize("backend", BACKENDS)
def test_exp_is_within_two_ulp_on_every_float_of_the_used_range(backend: str) -> None:
    """The passes use exp on (−104, 0]: every 16th float32 bit pattern from −2⁻¹² to −104, and denser samples."""
    bits = np.arange(np.float32(2**-12).view(np.uint32), np.float32(104).view(np.uint32), 16, dtype=np.uint32)
    near = -np.logspace(-30, -3, 200_000).astype(np.float32)
    x = np.concatenate([-bits.view(np.float32), near, np.linspace(0, 88, 200_001, dtype=np.float32)])
    gold = np.exp(x.astype(np.float64))
    got = x.copy()
    efface_native.exp_in_place(got, backend)
    ulp = np.spacing(np.maximum(gold, 1e-44).astype(np.float32)).astype(np.float64)
    assert (np.abs(got - gold) / ulp).max() <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_tanh_is_within_two_ulp(backend: str) -> None:
    x = np.concatenate([np.linspace(-12, 12, 1_000_001), np.logspace(-30, 1, 200_000)]).astype(np.float32)
    gold = np.tanh(x.astype(np.float64))
    got = x.copy()
    efface_native.tanh_in_place(got, backend)
    ulp = np.spacing(np.abs(gold).astype(np.float32) + np.float32(1e-44)).astype(np.float64)
    assert (np.abs(got - gold) / ulp).max() <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values(backend: str) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 89, -105, 3.4e38, -3.4e38], np.float32)
    efface_native.exp_in_place(x, backend)
    np.testing.assert_array_equal(x, np.array([np.nan, np.inf, 0, 1, 1, np.inf, 0, np.inf, 0], np.float32))
    t = np.array([np.nan, np.inf, -np.inf, 0, 100, -100], np.float32)
    efface_native.tanh_in_place(t, backend)
    np.testing.assert_array_equal(t, np.array([np.nan, 1, -1, 0, 1, -1], np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("vocabulary", [1, 3, 15, 16, 17, 1024, 1025, 4099])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_equals_the_naive_pass(backend: str, vocabulary: int, dtype: str) -> None:
    rng = np.random.default_rng(vocabulary)
    values = rng.normal(size=(4, vocabulary)) * 4
    logits = bf16(values) if dtype == "bfloat16" else values.astype(dtype)
    exact = widened(logits, dtype)
    targets = rng.integers(0, vocabulary, 4)
    logprobs = np.full(4, np.nan, np.float64 if dtype == "float64" else np.float32)
    efface_native.row_pass(describe(logits, dtype), targets, gradient=True, logprobs=logprobs, backend=backend)
    after = widened(logits, dtype)
    eps = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2e-6, "float64": 1e-13}[dtype]
    for row in range(4):
        expected, p = naive(exact[row], targets[row])
        assert logprobs[row] == pytest.approx(expected, rel=2e-6, abs=2e-6)
        np.testing.assert_allclose(after[row], p, rtol=1.01 * eps, atol=6e-8 if dtype == "float16" else 1e-30)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("place", ["in place", "elsewhere", "over the reference"])
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 1025, 4099])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_pairs_give_the_distributions_of_their_sums(backend: str, vocabulary: int, place: str) -> None:
    rng = np.random.default_rng(vocabulary)
    exact = rng.normal(size=(2, 4, vocabulary)) * 4
    high = bf16(exact)
    low = bf16(exact - widened(high, "bfloat16"))
    z, zr = widened(high, "bfloat16") + widened(low, "bfloat16")
    targets, rows = rng.integers(0, vocabulary, 4), np.arange(4)
    zr[rows, targets] -= 2.0
    p, q = softmax(z), softmax(zr)
    policy, reference, elsewhere = high[0].copy(), high[1].copy(), np.full_like(high[0], 0x7FC0)
    into = {"in place": policy, "elsewhere": elsewhere, "over the reference": reference}[place]
    divergence, entropy = np.full(4, np.nan, np.float32), np.full(4, np.nan, np.float32)
    efface_native.distribution_pass(
        describe(policy, "bfloat16", residual=low[0]),
        describe(reference, "bfloat16", residual=low[1]),
        targets,
        shift=2.0,
        into=describe(into, "bfloat16"),
        divergence=divergence,
        entropy=entropy,
        threads=2,
        backend=backend,
    )
    np.testing.assert_allclose(divergence, (q * np.log(q / p)).sum(1), rtol=3e-6, atol=1e-6)
    np.testing.assert_allclose(entropy, -(q * np.log(q)).sum(1), rtol=3e-6, atol=1e-6)
    np.testing.assert_allclose(widened(into, "bfloat16"), p - q, rtol=1.01 * 2**-8, atol=1e-7)
    for kept, before in ((policy, high[0]), (reference, high[1])):
        assert kept is into or np.array_equal(kept, before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_distributions_have_no_difference_at_all(backend: str, dtype: str) -> None:
    values = np.random.default_rng(0).normal(size=(3, 1000))
    logits = bf16(values) if dtype == "bfloat16" else values.astype(dtype)
    divergence, entropy = np.ones(3, np.float32), np.ones(3, np.float32)
    out = logits.copy()
    efface_native.distribution_pass(
        describe(out, dtype),
        describe(logits, dtype),
        np.array([0, 1, 999]),
        shift=0.0,
        into=describe(out, dtype),
        divergence=divergence,
        entropy=entropy,
        backend=backend,
    )
    assert not out.any()
    assert not divergence.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_every_payload_stays_nan(backend: str) -> None:
    """Rounding to bf16 adds to the bits, and those of 0xffffffff would wrap around to 0."""
    for bits in (0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001):
        z = np.zeros((1, 40), np.float32)
        z.view(np.uint32)[0, 3] = bits
        out = np.zeros((1, 40), np.uint16)
        divergence, entropy = np.zeros(1, np.float32), np.zeros(1, np.float32)
        for policy, reference in ((z, np.zeros_like(z)), (np.zeros_like(z), z)):
            efface_native.distribution_pass(
                describe(policy),
                describe(reference),
                np.array([0]),
                shift=0.0,
                into=describe(out, "bfloat16"),
                divergence=divergence,
                entropy=entropy,
                backend=backend,
            )
            assert np.isnan(widened(out, "bfloat16")).all()
            assert np.isnan(divergence).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_rounded_to_nearest_even(backend: str) -> None:
    """With equal logits, p is exact if V is a power of two, and 1/3 rounded if V = 3."""
    for dtype, expected in (("bfloat16", 0x3EAB), ("float16", 0x3555)):
        logits = np.zeros((1, 3), np.uint16 if dtype == "bfloat16" else np.float16)
        efface_native.row_pass(
            describe(logits, dtype), np.array([0]), gradient=True, logprobs=np.zeros(1, np.float32), backend=backend
        )
        assert logits.view(np.uint16)[0, 1] == expected


def small() -> dict[str, object]:
    return {
        "logits": describe(np.zeros((2, 5), np.float32)),
        "targets": np.array([0, 4]),
        "gradient": False,
        "logprobs": np.zeros(2, np.float32),
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": np.array([0, 5])}, ValueError, r"token ids in 0 .. 4 .* got 5 in row 1"),
        ({"targets": np.array([-1, 0])}, ValueError, "got -1 in row 0"),
        ({"targets": np.array([0])}, ValueError, "expected 2 entries"),
        ({"targets": np.array([0, 1, 2])}, ValueError, "expected 2 entries, got 3"),
        ({"targets": np.array([0, 1], np.int32)}, TypeError, "`targets`: expected dtype int64"),
        ({"logprobs": np.zeros(3, np.float32)}, ValueError, "`logprobs`: expected 2 entries, got 3"),
        ({"logprobs": np.zeros(2)}, TypeError, "`logprobs`: expected dtype float32, got float64"),
        ({"logits": Logits(0, "float32", 2, 5, 5, 0.0, 0)}, ValueError, "expected an address, got null"),
        ({"logits": Logits(8, "float32", -1, 5, 5, 0.0, 0)}, ValueError, "`logprobs`: expected -1 entries"),
        ({"logits": Logits(8, "float32", 2, 0, 5, 0.0, 0)}, ValueError, "vocabulary >= 1"),
        ({"logits": Logits(8, "float32", 2, 5, -5, 0.0, 0)}, ValueError, "stride >= 0"),
        ({"logits": (8, "float32", 2, 5, 5, 0.0, 0)}, TypeError, "incompatible function arguments"),
        ({"logits": None}, TypeError, "incompatible function arguments"),
        ({"reference_logits": (8, "float32", 2, 5, 5, 0.0, 0)}, TypeError, "incompatible function arguments"),
        ({"reference_logits": Logits(8, "float32", 2, 5, 5)}, TypeError, "`reference_logprobs`: expected an array"),
        ({"logits": Logits(8, "float32", 2, 5, 5, -1.0, 0)}, ValueError, "softcap: expected 0"),
        ({"logits": Logits(8, "float32", 2, 5, 5, float("nan"), 0)}, ValueError, "softcap: expected 0"),
        ({"logits": Logits(8, "float32", 2, 5, 5, 0.0, 8)}, ValueError, "expected no residual in the row pass"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], error: type[Exception], message: str) -> None:
    keep = small()
    arguments = {**keep, **change}
    with pytest.raises(error, match=message):
        efface_native.row_pass(arguments.pop("logits"), arguments.pop("targets"), **arguments)


def test_a_bad_destination_is_refused() -> None:
    z, vectors = (
        np.zeros((2, 5), np.float32),
        {"divergence": np.zeros(2, np.float32), "entropy": np.zeros(2, np.float32)},
    )
    for into, message in (
        (describe(np.zeros((2, 6), np.float32)), "`into`: expected 2 x 5, the shape of `logits`, got 2 x 6"),
        (describe(np.zeros((2, 5), np.float64)), "`into`: expected a dtype other than fp64"),
        (Logits(8, "float32", 2, 5, -5, 0.0, 0), "`into`: expected stride >= 0"),
        (Logits(8, "float32", 2, 5, 4, 0.0, 0), "`into`: expected rows that do not overlap, stride >= 5, got 4"),
        (Logits(0, "float32", 2, 5, 5, 0.0, 0), "`into`: expected an address, or None"),
        (Logits(8, "float32", 2, 5, 5, 3.0, 0), "`into`: expected neither softcap nor residual"),
        (Logits(8, "float32", 2, 5, 5, 0.0, 8), "`into`: expected neither softcap nor residual"),
    ):
        with pytest.raises(ValueError, match=message):
            efface_native.distribution_pass(
                describe(z), describe(z.copy()), np.array([0, 4]), shift=0.0, into=into, **vectors
            )


def test_logits_by_name_by_position_and_by_default_are_the_same() -> None:
    """Omitted values are 0: no cap, no residual."""
    z, target = np.array([[1.0, 2.0, 3.0]]), np.array([2])
    names = ("address", "dtype", "rows", "vocabulary", "stride", "softcap", "residual")
    everything = (z.ctypes.data, "float64", 1, 3, 3, 0.0, 0)
    expected = naive(z[0], 2)[0]
    for logits in (
        Logits(*everything),
        Logits(*everything[:5]),
        Logits(**dict(zip(names, everything, strict=True))),
        Logits(**dict(zip(names, everything[:5], strict=False))),
    ):
        for reference in (None, logits):
            out, reference_out = np.zeros(1), np.zeros(1)
            efface_native.row_pass(
                logits,
                target,
                gradient=False,
                logprobs=out,
                reference_logits=reference,
                reference_logprobs=None if reference is None else reference_out,
            )
            assert out[0] == pytest.approx(expected, rel=1e-14)
            assert reference_out[0] == (0 if reference is None else out[0])


@pytest.mark.parametrize(
    "change",
    [
        {"address": -1},
        {"address": 0.5},
        {"dtype": None},
        {"rows": "2"},
        {"stride": 1.5},
        {"softcap": None},
        {"more": 1},
    ],
)
def test_logits_of_other_types_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"address: .*dtype: .*rows: .*vocabulary: .*stride: .*softcap: .*residual: "):
        Logits(**{"address": 8, "dtype": "float32", "rows": 2, "vocabulary": 5, "stride": 5, **change})


def error_of(accept: Callable[[str], object], name: str) -> str:
    try:
        accept(name)
    except ValueError as error:
        return str(error)
    return ""


def plan(retain_sampling: str) -> None:
    lengths = np.array([3, 3])
    numbers = dict.fromkeys(("pairs_per_step", "token_budget", "shared_tokens", "world_size", "seed", "epoch"), 1)
    efface_native.plan_epoch(lengths, lengths, lengths[:0], **numbers, retain_sampling=retain_sampling, drop_last=False)


@pytest.mark.parametrize(
    ("accept", "message"),
    [
        (plan, "`retain_sampling`: expected 'random', 'cycle' or 'paired', got 'none'"),
        (lambda name: Logits(8, name, 2, 5, 5), "`dtype`: expected bfloat16, float16, float32 or float64, got none"),
        (
            lambda name: efface_native.exp_in_place(np.zeros(1, np.float32), name),
            "`backend`: expected best, portable, avx2, avx512 or neon, got none",
        ),
    ],
)
def test_every_name_that_an_error_lists_is_accepted(accept: Callable[[str], object], message: str) -> None:
    assert error_of(accept, "none") == message
    for name in re.findall(r"\w{3,}", message.partition("expected")[2].partition("got")[0]):
        lacking = message.startswith("`backend`") and name not in {"best", *BACKENDS}
        refused = "`backend`: expected one that this machine and this build support, got another one; use `best`"
        assert error_of(accept, name) == (refused if lacking else "")


def parameters(function: ast.FunctionDef) -> list[tuple[str, ...]]:
    """Return names and defaults by kind of parameter, without ``self``."""
    given = function.args
    defaults = [None] * (len(given.args) - len(given.defaults)) + given.defaults
    pairs = [[*zip(given.args, defaults, strict=True)], [*zip(given.kwonlyargs, given.kw_defaults, strict=True)]]
    return [
        (kind, name.arg, ast.unparse(default) if default else "")
        for kind, group in zip(("positional", "by name"), pairs, strict=True)
        for name, default in group
        if name.arg != "self"
    ]


def test_the_stub_has_the_parameters_of_the_module() -> None:
    """mypy's stubtest does not see them, because pybind11 writes signatures only into docstrings."""
    module = ast.parse(STUB.read_text(encoding="utf-8"))
    places: list[tuple[object, ast.Module | ast.ClassDef]] = [(efface_native, module)]
    places += [(getattr(efface_native, c.name, None), c) for c in module.body if isinstance(c, ast.ClassDef)]
    functions = [(place, each) for place, node in places for each in node.body if isinstance(each, ast.FunctionDef)]
    assert len(functions) == 13
    for place, function in functions:
        signature = getattr(place, function.name).__doc__.splitlines()[0]
        (built,) = ast.parse(f"def {signature}: ...").body
        assert isinstance(built, ast.FunctionDef)
        if function.name != "__len__":  # pybind11 leaves its only argument without a name
            assert parameters(built) == parameters(function), function.name
