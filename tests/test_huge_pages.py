"""Large tables lie in huge pages, where Linux says so itself."""

import pathlib

import pytest
import torch

from recblocks import EmbeddingTable, FusedEmbeddingLookup, IdFeature, IdTable, ServingLookup
from recblocks._memory import copied, in_huge_pages

MAPS = pathlib.Path("/proc/self/smaps")
needs_linux = pytest.mark.skipif(
    not (MAPS.exists() and pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()),
    reason="needs Linux, and its huge pages",
)
ROWS = 600_000  # of 8 float32, 19 MB; their ids are 6 MB of keys and 3 of rows


def about(tensor):
    """What Linux says of the memory in the middle of a tensor."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    inside, said = False, {}
    for line in MAPS.read_text().splitlines():
        head = line.split()[0]
        if not head.endswith(":"):
            begin, end = (int(one, 16) for one in head.split("-"))
            inside = begin <= middle < end
        elif inside:
            said[head] = line.split()[1:]
    return said


def advised(tensor):
    """Whether huge pages are wanted for a tensor."""
    return "hg" in about(tensor)["VmFlags:"]


def granted(tensor):
    """Whether there are some."""
    return int(about(tensor)["AnonHugePages:"][0]) > 0


@needs_linux
def test_tables_and_weights_are_in_huge_pages_and_stay_there():
    lookup = FusedEmbeddingLookup({"t": EmbeddingTable(ROWS, 8)}, {"f": IdFeature("t")})
    lookup.insert({"f": torch.arange(1000)})
    before = lookup({"f": torch.arange(1000)}).pooled.detach()

    def check(lookup, served):
        of_served = served.weight_8, served.keys, served.rows
        assert all(map(advised, (lookup.weights["8"], lookup.table.keys, lookup.table.rows, *of_served)))
        for one in (lookup, served):
            assert torch.equal(one({"f": torch.arange(1000)}).pooled, before)

    check(lookup, ServingLookup(lookup, dtype=torch.float32))
    had = granted(lookup.weights["8"])
    lookup.grow("t", 2 * ROWS)
    assert granted(lookup.weights["8"]) or not had
    served = ServingLookup(lookup, dtype=torch.float32)
    check(lookup, served)
    other = FusedEmbeddingLookup({"t": EmbeddingTable(1, 8)}, {"f": IdFeature("t")})
    small = ServingLookup(other, dtype=torch.float32)
    other.load_state_dict(lookup.state_dict())
    small.load_state_dict(served.state_dict())
    check(other, small)


@needs_linux
def test_a_loaded_table_is_in_huge_pages(tmp_path):
    table = IdTable(ROWS)
    table.insert(torch.arange(9))
    table.save(tmp_path / "table")
    again = IdTable.load(tmp_path / "table")
    assert advised(again.keys)
    assert advised(again.rows)
    assert again.find(torch.arange(9)).tolist() == list(range(9))


def test_what_is_small_or_elsewhere_is_left_alone():
    for tensor in (torch.empty(0), torch.arange(3), torch.empty(10**9, device="meta")):
        assert in_huge_pages(tensor) is tensor
    given = torch.arange(12).view(3, 4).t()
    assert torch.equal(copied(given), given)
    assert copied(given).is_contiguous()
    assert copied(given, torch.float16).dtype == torch.float16
