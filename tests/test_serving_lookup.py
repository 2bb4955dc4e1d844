"""The lookup for serving: the trained one's vectors, from rows of fewer bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lookups import FEATURES, TABLES

from recblocks import EmbeddingTable, FusedEmbeddingLookup, IdFeature, ServingLookup, quantize_rows

DTYPES = [torch.float32, torch.float16, torch.int8]


def batch(offset=0):
    return {
        "user": torch.arange(-4, 4) + offset,
        "item": torch.arange(8) - offset,
        "liked": torch.arange(16).view(8, 2) + offset,
        "tags": (torch.arange(6), torch.tensor([0, 0, 1, 3, 3, 4, 5, 6, 6])),
        "seen": torch.arange(12).view(3, 4) + 2 * offset,
    }


def trained(features=FEATURES):
    lookup = FusedEmbeddingLookup(TABLES, features, generator=torch.Generator().manual_seed(0))
    lookup.insert(batch(), generator=torch.Generator().manual_seed(1))
    return lookup


def rounded(weight, dtype):
    """What the rows become, in float32."""
    if dtype != torch.int8:
        return weight.to(dtype).float()
    scales = [max(abs(w) for w in row) / 127 or 1.0 for row in weight.tolist()]
    rows = [[round(w / scale) * scale for w in row] for row, scale in zip(weight.tolist(), scales, strict=True)]
    return torch.tensor(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 3, 1000])
def test_it_gives_the_vectors_of_rows_that_were_rounded(dtype, offset):
    lookup, features = trained(), batch(offset)
    got = ServingLookup(lookup, dtype=dtype)(features)
    for weight in lookup.weights.values():
        weight.data = rounded(weight.detach(), dtype)
    want = lookup(features)
    # Sums of two in another order, and a scale in float32 where the oracle's is a double: some 2**-24 of at most 1.
    torch.testing.assert_close(got.pooled, want.pooled, rtol=0, atol=3e-7)
    torch.testing.assert_close(got.unpooled["seen"], want.unpooled["seen"], rtol=0, atol=1e-7)
    assert got.pooled.dtype == torch.float32


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_rows_of_eight_bits_are_off_by_half_a_step_at_most(rows):
    weight = torch.tensor(rows, dtype=torch.float32)
    got, scale = quantize_rows(weight)
    for row, their, step in zip(weight.tolist(), got.tolist(), scale.tolist(), strict=True):
        assert all(abs(q) <= 127 for q in their)
        assert step == pytest.approx(max(map(abs, row)) / 127, rel=1e-6, abs=1e-44)
        for w, q in zip(row, their, strict=True):
            # Half a step, and what float32 loses in the division and in the scale; below 1e-37 floats lose bits.
            assert abs(w - q * step) <= step * (0.5 + 127 * 2**-22) + 1e-40
    assert (got[(weight == 0).all(1)] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_a_copy_that_training_does_not_change(dtype):
    lookup, features = trained(), batch()
    served = ServingLookup(lookup, dtype=dtype)
    want = served(features).pooled
    lookup.insert(batch(3))
    lookup.erase("items", torch.arange(5))
    for weight in lookup.weights.values():
        weight.data.zero_()
    assert torch.equal(served(features).pooled, want)
    assert torch.equal(served(served.pack(features)).pooled, want)
    assert not list(served.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_process_loads_it_without_the_trained_one(dtype):
    served, features = ServingLookup(trained(), dtype=dtype), batch()
    other = ServingLookup(FusedEmbeddingLookup(TABLES, FEATURES, device="meta"), dtype=dtype)
    other.load_state_dict(served.state_dict(), assign=True)
    assert torch.equal(other(features).pooled, served(features).pooled)
    other_order = {name: FEATURES[name] for name in reversed(FEATURES)}
    with pytest.raises(ValueError, match="state_dict must be of a lookup with features"):
        ServingLookup(trained(other_order), dtype=dtype).load_state_dict(served.state_dict())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_of_other_capacities_is_taken_and_one_of_another_dtype_refused(dtype):
    lookup, features = trained(), batch()
    served = ServingLookup(lookup, dtype=dtype)
    want = served(features).pooled
    others = [ServingLookup(trained(), dtype=other) for other in DTYPES if other != dtype]
    for other in others:
        for strict in (True, False):
            with pytest.raises((TypeError, ValueError), match="state_dict"):
                served.load_state_dict(other.state_dict(), strict=strict)
    state = served.state_dict()
    for name in ("rows", "keys", "weight_4", "begins", "places"):
        with pytest.raises(ValueError, match="state_dict"):
            served.load_state_dict({**state, name: state[name][:2]})
    assert torch.equal(served(features).pooled, want)
    lookup.grow("users", 33)
    lookup.insert({name: ids + 50 if isinstance(ids, torch.Tensor) else ids for name, ids in features.items()})
    grown = ServingLookup(lookup, dtype=dtype)
    served.load_state_dict(grown.state_dict())
    assert torch.equal(served(batch(50)).pooled, grown(batch(50)).pooled)
    assert served.double()(features).pooled.dtype == torch.float32
    assert torch.equal(served.half()(features).pooled, grown(features).pooled)


def test_a_reset_one_knows_no_id():
    served = ServingLookup(trained())
    served.reset_parameters()
    assert not served(batch()).pooled.any()
    other = ServingLookup(FusedEmbeddingLookup(TABLES, FEATURES))
    assert torch.equal(served.keys, other.keys)
    assert torch.equal(served.places, other.places)
    assert torch.equal(served.begins, other.begins)


def test_weights_that_float16_cannot_hold_are_refused():
    lookup = trained()
    lookup.weights["4"].data[0, 0] = 7e4
    with pytest.raises(ValueError, match=r"lookup must have weights that torch\.float16 can hold, got 70000"):
        ServingLookup(lookup)
    with pytest.raises(ValueError, match="weight must have at least one column"):
        quantize_rows(torch.zeros(3, 0))
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor"):
        quantize_rows([[1.0]])


def test_bytes_of_a_row_are_those_that_are_promised():
    lookup = FusedEmbeddingLookup({"item": EmbeddingTable(50_000, dim=32)}, {"item": IdFeature("item")})
    for dtype, of_weights in zip(DTYPES, (128, 64, 36), strict=True):
        held = sum(tensor.nbytes for tensor in ServingLookup(lookup, dtype=dtype).buffers())
        assert held / 50_000 == pytest.approx(of_weights + 12 / 0.85, rel=1e-3)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="lookup must be a FusedEmbeddingLookup, got"):
        ServingLookup(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float32, torch\.float16, torch\.int8, got"):
        ServingLookup(trained(), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"features must be those of the lookup, got none of \['tags'\]"):
        ServingLookup(trained())({name: ids for name, ids in batch().items() if name != "tags"})
