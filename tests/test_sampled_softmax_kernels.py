"""Triton's kernels of the sampled softmax at the sizes they are built for; on a GPU, or else in its interpreter."""

import hopper
import pooled_losses
import pytest
import torch
from largest import Largest
from poison import inside_nan
from pooled_losses import FLOAT32

from recblocks import own_positive_mask, sampled_softmax_loss
from recblocks.kernels.own_positives import owned_ranges

kernels = pytest.importorskip("recblocks.kernels.sampled_softmax.triton", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
# A probability is rounded to bfloat16 before it meets an embedding, and so is the sum.
BFLOAT16 = 2 * 2**-8


def case(rows, columns, dim, dtype, mask="own", num_items=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def ids(most, number):
        return torch.randint(most, (number,), generator=generator).to(DEVICE) * 7919 - 10**12

    embeddings = [inside_nan((draw(n, dim) / dim**0.25).to(DEVICE, dtype)) for n in (rows, rows, columns)]
    log_q = inside_nan(-torch.rand(rows + columns, generator=generator).to(DEVICE))
    weights = torch.rand(rows, generator=generator) * (torch.rand(rows, generator=generator) > 0.1)
    weights = inside_nan(weights.to(DEVICE))
    keywords = {"log_q_positives": log_q[:rows], "log_q_negatives": log_q[rows:], "weights": weights}
    users, num_items = ids(rows // 3 + 1, rows), num_items or columns // 2 + 1
    own = users, ids(num_items, columns), users, ids(num_items, rows)
    if mask == "own":
        keywords["own"] = own
    elif mask == "masked":
        keywords["masked"] = own_positive_mask(*own)
    return embeddings, keywords


def agree(embeddings, keywords, dtype):
    allowed = BFLOAT16 if dtype == torch.bfloat16 else FLOAT32
    pooled_losses.agree(sampled_softmax_loss, embeddings, keywords, "log_q_negatives", dtype, allowed)


@pytest.mark.parametrize("mask", ["none", "own", "masked"])
@pytest.mark.parametrize(
    ("rows", "columns", "dim", "dtype"),
    [
        (1, 1, 1, torch.float32),
        (127, 31, 3, torch.float32),
        (128, 32, 64, torch.float32),
        (129, 33, 17, torch.float32),
        (131, 1031, 61, torch.float32),
        (1, 64, 256, torch.bfloat16),
        (129, 65, 100, torch.bfloat16),
        (1031, 131, 16, torch.bfloat16),
    ],
)
def test_loss_and_gradients_at_awkward_sizes(rows, columns, dim, dtype, mask):
    agree(*case(rows, columns, dim, dtype, mask), dtype)


@pytest.mark.parametrize("num_items", [1, 2, 7])
def test_items_that_fill_tiles_and_splits(num_items):
    """Each user's columns are a few long ranges, and each item's rows many short ones."""
    agree(*case(150, 1100, 8, torch.float32, num_items=num_items), torch.float32)


def test_a_user_of_every_row_and_pairs_that_stand_twice():
    embeddings, keywords = case(140, 1050, 8, torch.float32)
    users, columns, _, items = keywords["own"]
    same = torch.zeros_like(users)
    agree(
        embeddings,
        keywords | {"own": (same, columns, torch.cat([same, same]), torch.cat([items, items]))},
        torch.float32,
    )
    nobody = torch.full_like(users, 5)
    agree(embeddings, keywords | {"own": (users, columns, nobody, items)}, torch.float32)


def test_the_pool_in_splits_is_the_pool_at_once(monkeypatch):
    embeddings, keywords = case(70, 1500, 8, torch.float32)
    monkeypatch.setattr(kernels, "_PROGRAMS", 1)
    given = sampled_softmax_loss, embeddings, keywords, "log_q_negatives", torch.float32, "triton"
    loss, want = pooled_losses.gradients(*given)
    monkeypatch.setattr(kernels, "_PROGRAMS", 528)
    monkeypatch.setattr(kernels, "_LEAST_SWEPT", 37)
    other, got = pooled_losses.gradients(*given)
    torch.testing.assert_close(other, loss, rtol=FLOAT32, atol=0)
    for one, wanted in zip(got, want, strict=True):
        assert (one - wanted).norm() <= FLOAT32 * wanted.norm()


def test_nothing_of_rows_times_columns_is_held():
    rows, columns = 1100, 1500
    (queries, _, negatives), keywords = case(rows, columns, 4, torch.float32)
    _, _, of_rows, of_columns = owned_ranges(*keywords["own"])
    inverse = torch.ones((), device=DEVICE)
    largest = Largest()
    with largest:
        sums, _ = kernels.softmax_over_columns(queries, negatives, None, inverse, None, of_rows, True)
        kernels.gradients_over_rows(queries, negatives, None, inverse, None, of_columns, sums, torch.ones_like(sums))
    assert 4 * rows <= largest.elements < rows * columns / 20


BUILDING = """
import hopper, itertools, torch
from recblocks.kernels.sampled_softmax import triton as kernel

for (dtype, name), dim, (biased, masked, owned), function in itertools.product(
    ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")),
    (16, 33, 64, 256),
    ((False, False, False), (True, True, False), (True, False, True)),
    (kernel.softmax_of_rows, kernel.gradients_of_columns),
):
    if dtype == torch.float32 and dim > 64:
        continue
    types = dict.fromkeys(function.arg_names, "*fp32") | dict.fromkeys(("num_rows", "num_columns", "swept"), "i32")
    types |= dict.fromkeys(("begin", "end", "first", "last"), "*i32")
    types |= {"queries": name, "negatives": name, "masked": "*u8"}
    sizes, options = kernel.sizes_of(dim, dtype, masked)
    fixed = sizes | {"BIASED": biased, "MASKED": masked, "OWNED": owned}
    if function is kernel.softmax_of_rows:
        fixed["WITH_MEAN"] = True
    if not biased:
        fixed["bias"] = None
    if not masked:
        fixed["masked"] = None
    if not owned:
        fixed |= dict.fromkeys(("begin", "end", "first", "last"))
    aligned = [one for one in function.arg_names if types[one].startswith("*")]
    hopper.build(function, types, fixed, aligned, **options)
"""


def test_kernels_build_for_a_hopper_gpu_spill_nothing_and_use_its_matrix_unit(tmp_path):
    built = hopper.run(BUILDING, tmp_path)
    assert len(built) == 42
    for one in built:
        assert one.spilled == 0
        assert one.shared <= 232_448
        assert one.products > 0
    # Tiles are read ahead; but for one kernel that reads nothing but lines of 33 numbers of two bytes.
    assert sum(one.copies == 0 for one in built) == 1
