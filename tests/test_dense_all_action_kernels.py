"""Triton's kernels of the dense all-action loss at the sizes they are built for; on a GPU, or else interpreted."""

import hopper
import pooled_losses
import pytest
import torch
from largest import Largest
from poison import inside_nan
from pooled_losses import FLOAT32

from recblocks import dense_all_action_loss
from recblocks.kernels.windows import windows

kernels = pytest.importorskip("recblocks.kernels.dense_all_action.triton", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
# A share is rounded to bfloat16 before it meets an embedding, and so are the sums of both kinds and their own sum.
BFLOAT16 = 3 * 2**-8


def case(rows, positives, negatives, dim, dtype, num_users=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids(most, number):
        return torch.randint(most, (number,), generator=generator).to(DEVICE) * 7919 - 10**12

    sizes = rows, positives, negatives
    embeddings = [torch.randn(n, dim, generator=generator) / dim**0.25 for n in sizes]
    embeddings = [inside_nan(one.to(DEVICE, dtype)) for one in embeddings]
    log_q = inside_nan(-torch.rand(positives + negatives, generator=generator).to(DEVICE))
    weights = torch.rand(rows, generator=generator) * (torch.rand(rows, generator=generator) > 0.1)
    num_users = num_users or rows // 9 + 1
    return embeddings, {
        "query_users": ids(num_users, rows),
        "query_times": torch.randint(99, (rows,), generator=generator).to(DEVICE),
        "positive_users": ids(num_users, positives),
        "positive_times": torch.randint(99, (positives,), generator=generator).to(DEVICE),
        "positive_items": ids(positives + 1, positives),
        "negative_items": ids(positives + 1, negatives),
        "window": 40,
        "log_q_positives": log_q[:positives],
        "log_q_negatives": log_q[positives:],
        "weights": inside_nan(weights.to(DEVICE)),
    }


def agree(embeddings, keywords, dtype):
    allowed = BFLOAT16 if dtype == torch.bfloat16 else FLOAT32
    pooled_losses.agree(dense_all_action_loss, embeddings, keywords, "log_q_positives", dtype, allowed)


@pytest.mark.parametrize(
    ("rows", "positives", "negatives", "dim", "dtype"),
    [
        (1, 1, 1, 1, torch.float32),
        (127, 31, 7, 3, torch.float32),
        (128, 32, 0, 64, torch.float32),
        (129, 133, 33, 17, torch.float32),
        (131, 1031, 1, 61, torch.float32),
        (1, 64, 7, 256, torch.bfloat16),
        (129, 165, 33, 100, torch.bfloat16),
        (1031, 131, 7, 16, torch.bfloat16),
    ],
)
def test_loss_and_gradients_at_awkward_sizes(rows, positives, negatives, dim, dtype):
    agree(*case(rows, positives, negatives, dim, dtype), dtype)


@pytest.mark.parametrize("num_users", [1, 2, 1000])
@pytest.mark.parametrize("correct_positive", [True, False])
def test_one_user_s_windows_fill_tiles_and_many_users_have_next_to_none(num_users, correct_positive):
    embeddings, keywords = case(150, 300, 20, 8, torch.float32, num_users)
    keywords["negative_items"] = keywords["negative_items"] + 1  # nobody's, so that one user has something to see
    agree(embeddings, keywords | {"correct_positive": correct_positive}, torch.float32)


def test_nothing_of_rows_times_columns_is_held():
    rows, columns = 1100, 1500
    (queries, positives, _), keywords = case(rows, columns, 0, 4, torch.float32)
    names = ("query_users", "query_times", "positive_users", "positive_times")
    found = windows(*[keywords[name] for name in names], 40)
    ranges = [one.int() for one in found[2:]]
    inverse, sums = torch.ones((), device=DEVICE), torch.ones(rows, device=DEVICE)
    queries, positives = queries[found.row_order], positives[found.column_order]
    largest = Largest()
    with largest:
        kernels.sums_over_positives(queries, positives, None, inverse, sums, *ranges[:2], True)
        kernels.sums_over_rows(queries, positives, None, inverse, sums, sums, *ranges[2:])
    assert 4 * rows <= largest.elements < rows * columns / 20


BUILDING = """
import hopper, itertools, torch
from recblocks.kernels.dense_all_action import triton as kernel

for (dtype, name), dim, shifted, function in itertools.product(
    ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")),
    (16, 33, 64, 256),
    (False, True),
    (kernel.pairs_of_rows, kernel.pairs_of_columns),
):
    if dtype == torch.float32 and dim > 64:
        continue
    types = dict.fromkeys(function.arg_names, "*fp32") | dict.fromkeys(("num_rows", "num_columns"), "i32")
    types |= {"queries": name, "positives": name, "first": "*i32", "last": "*i32"}
    sizes, options = kernel.sizes_of(dim, dtype, False)
    fixed = sizes | {"SHIFTED": shifted}
    if function is kernel.pairs_of_rows:
        fixed["WITH_PULLS"] = True
    if not shifted:
        fixed["shift"] = None
    aligned = [one for one in function.arg_names if types[one].startswith("*")]
    hopper.build(function, types, fixed, aligned, **options)
"""


def test_kernels_build_for_a_hopper_gpu_spill_nothing_and_use_its_matrix_unit(tmp_path):
    built = hopper.run(BUILDING, tmp_path)
    assert len(built) == 28
    for one in built:
        assert one.spilled == 0
        assert one.shared <= 232_448
        assert one.products > 0
