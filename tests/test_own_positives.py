import itertools

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recblocks import own_positive_mask
from recblocks.kernels import own_positives
from recblocks.kernels.own_positives import OwnPositives, owned_by_every_row, owned_ranges

# Few values, so that users own several items and items stand in several columns; the ends of int64 among them.
USERS = st.sampled_from([0, -1, 2**63 - 1])
ITEMS = st.sampled_from([0, 1, 2**63 - 1, -(2**63)])


@st.composite
def id_vectors(draw):
    row_users = draw(st.lists(USERS, max_size=6))
    column_items = draw(st.lists(ITEMS, max_size=7))
    known = draw(st.lists(st.tuples(USERS, ITEMS), max_size=10))
    own = (row_users, column_items, [u for u, _ in known], [i for _, i in known])
    return tuple(torch.tensor(ids, dtype=torch.int64) for ids in own)


def expected(own):
    row_users, column_items, users, items = (ids.tolist() for ids in own)
    known = list(zip(users, items, strict=True))
    mask = [[oracles.is_own_positive(user, item, known) for item in column_items] for user in row_users]
    return torch.tensor(mask, dtype=torch.bool).view(len(row_users), len(column_items))


@given(own=id_vectors())
def test_mask_equals_the_scalar_oracle(own):
    assert torch.equal(own_positive_mask(*own), expected(own))
    assert torch.equal(own_positives._mask(*own), expected(own))


@given(own=id_vectors(), rows=st.integers(1, 4), share=st.sampled_from([0.0, 0.3, 1.0]), listed=st.booleans())
def test_tiles_are_the_rows_of_the_mask_whichever_way_they_are_made(own, rows, share, listed):
    """By the list of owned entries, by a table where entries are many, and by a table always, as on a GPU."""
    chunked = OwnPositives(*own)
    if not listed:
        chunked.owned = None
    before, own_positives._SPARSE_SHARE = own_positives._SPARSE_SHARE, share
    try:
        for start in range(0, len(own[0]), rows):
            tile = torch.zeros(len(own[0][start : start + rows]), len(own[1]))
            chunked.fill_(tile, start, -torch.inf)
            assert torch.equal(tile == -torch.inf, expected(own)[start : start + rows])
    finally:
        own_positives._SPARSE_SHARE = before


@given(own=id_vectors())
def test_ranges_hold_what_the_mask_marks_in_order_on_both_sides(own):
    ranges, want = owned_ranges(*own), expected(own)
    for lines, order, mask in [
        (ranges.of_rows, ranges.column_order, want),
        (ranges.of_columns, ranges.row_order, want.t()),
    ]:
        assert all(one.dtype == torch.int32 for one in lines)
        got = torch.zeros_like(mask)
        for line, (begin, end) in enumerate(zip(lines.begin.tolist(), lines.end.tolist(), strict=True)):
            first, last = lines.first[begin:end].tolist(), lines.last[begin:end].tolist()
            assert first == sorted(first)
            assert last == sorted(last)
            for one, behind in zip(first, last, strict=True):
                assert one < behind <= mask.shape[1]
                got[line, order[one:behind]] = True
        assert torch.equal(got, mask)


@given(own=id_vectors(), data=st.data())
def test_columns_owned_by_every_present_row(own, data):
    rows = len(own[0])
    present = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), dtype=torch.bool)
    assert torch.equal(owned_by_every_row(*own, present=present), expected(own)[present].all(0))
    assert torch.equal(owned_by_every_row(*own), expected(own).all(0))


@given(own=id_vectors(), seed=st.integers(0, 100))
def test_order_and_repetition_of_known_pairs_do_not_matter(own, seed):
    generator = torch.Generator().manual_seed(seed)
    again = torch.randperm(2 * len(own[2]), generator=generator) % max(len(own[2]), 1)
    assert torch.equal(own_positive_mask(*own[:2], own[2][again], own[3][again]), own_positive_mask(*own))


def test_compiles_to_one_graph_and_needs_no_numbers():
    own = (torch.tensor([1, 1, 2]), torch.tensor([10, 20, 10, 30]), torch.tensor([1, 2, 2]), torch.tensor([10, 30, 5]))
    compiled = torch.compile(own_positive_mask, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*own), own_positive_mask(*own))
    mask = own_positive_mask(*[ids.to("meta") for ids in own])
    assert mask.shape == (3, 4)
    assert mask.dtype == torch.bool


@pytest.mark.parametrize(
    ("place", "name"), list(enumerate(["row_users", "column_items", "positive_users", "positive_items"]))
)
def test_bad_arguments_are_named(place, name):
    for bad, error in itertools.zip_longest(
        [torch.ones(2), torch.ones(2, dtype=torch.int32), [1, 2], torch.ones(2, 1, dtype=torch.int64)],
        [TypeError, TypeError, TypeError, ValueError],
    ):
        own = [torch.ones(2, dtype=torch.int64) for _ in range(4)]
        own[place] = bad
        with pytest.raises(error, match=name):
            own_positive_mask(*own)


def test_positive_vectors_must_be_equally_long():
    ones = torch.ones(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="positive_items"):
        own_positive_mask(ones, ones, ones, ones[:1])
