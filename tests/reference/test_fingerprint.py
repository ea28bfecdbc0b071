"""The fingerprint of weights: every bit counts, and nothing but content does."""

import random

import pytest
import torch

from efface.reference import fingerprint, model_fingerprint

BLOCK = 8 * fingerprint._BLOCK_WORDS  # bytes


def digest(**weights: torch.Tensor) -> bytes:
    return model_fingerprint(weights, {})


def flipped(tensor: torch.Tensor, byte: int, bit: int) -> torch.Tensor:
    copy = tensor.clone()
    copy.view(-1).view(torch.uint8)[byte] ^= 1 << bit
    return copy


@pytest.mark.parametrize(
    ("dtype", "count"),
    [
        pytest.param(torch.bfloat16, BLOCK // 2 + 3, id="two blocks, the second of 6 bytes"),
        pytest.param(torch.float32, BLOCK // 4, id="one full block"),
        pytest.param(torch.float16, 1, id="2 bytes"),
        pytest.param(torch.uint8, 5, id="5 bytes"),
        pytest.param(torch.float64, 7, id="words"),
    ],
)
def test_every_bit_counts(dtype: torch.dtype, count: int) -> None:
    tensor = torch.randint(-100, 100, (count,), generator=torch.Generator().manual_seed(0)).to(dtype)
    rng, size = random.Random(0), tensor.numel() * tensor.element_size()
    seen = {digest(w=tensor)}
    places = {(0, 0), (size - 1, 7), *((rng.randrange(size), rng.randrange(8)) for _ in range(40))}
    for byte, bit in places:
        seen.add(digest(w=flipped(tensor, byte, bit)))
    assert len(seen) == 1 + len(places)


def test_changes_that_cancel_in_a_plain_sum_count() -> None:
    """Two elements that change places or signs, at every place in a word; zeros of another length."""
    tensor = torch.arange(1.0, 65.0).bfloat16()
    seen = {digest(w=tensor)}
    for step in (1, 4, 32):
        swapped, negated = tensor.clone(), tensor.clone()
        swapped[[3, 3 + step]] = tensor[[3 + step, 3]]
        negated[[3, 3 + step]] *= -1  # the highest bit of a word
        seen |= {digest(w=swapped), digest(w=negated)}
    seen |= {digest(w=-tensor), digest(w=tensor.flip(0)), digest(w=torch.zeros(64)), digest(w=torch.zeros(65))}
    assert len(seen) == 11


def test_name_shape_dtype_and_settings_count() -> None:
    tensor = torch.arange(12.0)
    bits = tensor.view(torch.int32)
    seen = {
        model_fingerprint({"w": tensor}, {}),
        model_fingerprint({"v": tensor}, {}),
        model_fingerprint({"w": tensor.view(3, 4)}, {}),
        model_fingerprint({"w": bits}, {}),
        model_fingerprint({"w": tensor, "v": tensor}, {}),
        model_fingerprint({"w": tensor, "extra": "state"}, {}),
        model_fingerprint({"w": tensor}, {"rope_theta": 1e4}),
        model_fingerprint({"w": tensor}, {"rope_theta": 1e5}),
    }
    assert len(seen) == 8


def test_only_content_counts() -> None:
    a, b = torch.randn(30, 20), torch.randn(7)
    expected = digest(a=a, b=b, tied=a)
    assert digest(tied=a.clone(), b=b, a=a) == expected  # order, and whether memory is shared
    columns = a.t().contiguous().t()
    assert columns.stride() != a.stride()
    assert digest(a=columns, b=b, tied=a) == expected
    shifted = torch.cat([b[:1], b])[1:]  # starts within a word
    assert shifted.storage_offset() == 1
    assert digest(a=a, b=shifted, tied=a) == expected
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert digest(a=a.clone().requires_grad_(), b=b, tied=a) == expected


def test_the_weights_are_left_as_they_were() -> None:
    tensor = torch.randn(100)
    before = tensor.clone()
    digest(w=tensor)
    assert torch.equal(tensor, before)


def test_odd_shapes() -> None:
    seen = {digest(), digest(w=torch.empty(0)), digest(w=torch.empty(0, 3)), digest(w=torch.tensor(1.5))}
    seen.add(digest(w=torch.tensor([1.5])))
    assert len(seen) == 5
    with pytest.raises(ValueError, match="weight 'w': expected it in memory, got the meta device"):
        digest(w=torch.empty(3, device="meta"))


def test_a_fingerprint_stays_the_same_between_versions() -> None:
    """A figure that was printed once: a cache filled today is of use tomorrow. Raise FORMAT to change it."""
    weights = {"w": torch.arange(10, dtype=torch.int32), "b": torch.ones(3, dtype=torch.bfloat16)}
    assert model_fingerprint(weights, {"a": [1, None]}).hex() == "bae43f3667b2ce504973b896a8ce49d2"
