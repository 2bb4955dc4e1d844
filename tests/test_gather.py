"""One process; tests/test_distributed.py gathers between several."""

import pytest
import torch
from torch import distributed as dist

from recblocks import gather_rows


def test_without_a_process_group_rows_are_returned_as_they_are():
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(x) is x


def test_compiles_to_one_graph_without_a_process_group():
    x = torch.randn(3, 2)
    assert torch.equal(torch.compile(gather_rows, fullgraph=True, backend="aot_eager")(x), x)


def test_bad_input_is_named():
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got \[1\]"):
        gather_rows([1])
    with pytest.raises(ValueError, match=r"x must have shape \(R, ...\), got .* shape \(\)"):
        gather_rows(torch.tensor(1.0))


@pytest.mark.parametrize("rows", [0, 3])
def test_group_of_one_changes_nothing(tmp_path, rows):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = torch.randn(rows, 2, dtype=torch.float64, requires_grad=True)
        y = gather_rows(x)
        assert torch.equal(y, x)
        (3 * y).sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 3))
    finally:
        dist.destroy_process_group()
