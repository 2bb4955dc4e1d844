import hypothesis
import hypothesis.strategies as st
import oracles
import pytest
import torch

from recblocks.features.action import ActionEncoder, drop_out_of_vocabulary

SIZES = {"item_dim": 3, "num_action_types": 4, "num_surfaces": 2, "type_dim": 5, "surface_dim": 2}
DAY = 86400


def encoder(unit="ms", dtype=None):
    module = ActionEncoder(**SIZES, unit=unit, dtype=dtype)
    for part in (module.time, module.since_latest, module.gap):
        torch.nn.init.uniform_(part.phase, -3, 3)
    return module


def batch(rows=3, slots=5, unit_per_second=1000):
    gaps = torch.randint(1, 30 * DAY * unit_per_second, (rows, slots))
    return {
        "item": torch.randn(rows, slots, 3),
        "action_type": torch.randint(4, (rows, slots)),
        "surface": torch.randint(2, (rows, slots)),
        "duration": 100 * torch.rand(rows, slots),
        "time": 1_700_000_000 * unit_per_second - gaps.cumsum(1),
    }


def packed(columns, valid):
    return {name: column[valid] for name, column in columns.items()}, torch.nn.functional.pad(
        valid.sum(1).cumsum(0), (1, 0)
    )


masks = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=3).map(torch.tensor)


@pytest.mark.parametrize("unit", ["s", "ms"])
@hypothesis.given(valid=masks)
def test_each_action_is_the_vector_of_the_paper(unit, valid):
    module = encoder(unit)
    per_second = {"s": 1, "ms": 1000}[unit]
    columns = batch(*valid.shape, per_second)
    got = module(**columns, valid=valid)
    assert got.shape == (*valid.shape, module.out_dim) == (*valid.shape, 3 + 5 + 2 + 1 + 25 + 65 + 65)
    relative = [(28 * DAY) ** (i / 31) for i in range(32)]
    absolute = [60 * m for m in (15, 30, 45, 60, 120, 240, 480, 960, 1440, 7 * 1440, 28 * 1440, 365 * 1440)]
    for row in range(len(valid)):
        time, real = columns["time"][row].tolist(), valid[row].tolist()
        since = oracles.time_since_latest(time, real)
        gap = oracles.gap_to_next_older(time, real)
        for slot in range(valid.shape[1]):
            want = [0.0] * module.out_dim
            if real[slot]:
                want = oracles.action_vector(
                    columns["item"][row, slot].tolist(),
                    module.type_table.weight[columns["action_type"][row, slot]].tolist(),
                    module.surface_table.weight[columns["surface"][row, slot]].tolist(),
                    columns["duration"][row, slot].item(),
                    [
                        (time[slot], absolute, module.time.phase.tolist()),
                        (since[slot], relative, module.since_latest.phase.tolist()),
                        (gap[slot], relative, module.gap.phase.tolist()),
                    ],
                    per_second,
                )
            # The bar of the time encoding (tests/test_time.py), coarser than the rounding of log1p(duration) below 5.
            # The oracle's relative periods differ from the module's by 1e-16 of themselves: nothing at 30 days.
            torch.testing.assert_close(
                got[row, slot].double(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=2e-6
            )


@hypothesis.given(valid=masks, data=st.data())
def test_what_stands_at_an_invalid_slot_changes_no_output_and_no_gradient(valid, data):
    module = encoder()
    columns = batch(*valid.shape)
    garbage = {
        "item": float("nan"),
        "action_type": data.draw(st.sampled_from([-1, 4, 2**62])),
        "surface": -(2**63),
        "duration": data.draw(st.sampled_from([float("nan"), -1.0, float("inf")])),
        "time": data.draw(st.integers(-(2**63), 2**63 - 1)),
    }

    def run(columns):
        item = columns["item"].requires_grad_()
        out = module(**columns, valid=valid)
        grads = torch.autograd.grad(out.square().sum(), [item, *module.parameters()])
        return out, grads

    out, grads = run(columns)
    poisoned = {
        name: column.detach().masked_fill(~valid.reshape(valid.shape + (1,) * (column.ndim - 2)), garbage[name])
        for name, column in columns.items()
    }
    got, got_grads = run(poisoned)
    assert torch.equal(got, out)
    assert (got[~valid] == 0).all()
    for ours, theirs in zip(got_grads, grads, strict=True):
        assert torch.equal(ours, theirs)
    assert (got_grads[0][~valid] == 0).all()


@hypothesis.given(valid=masks)
def test_packed_and_padded_and_a_row_alone_agree(valid):
    module = encoder()
    columns = batch(*valid.shape)
    out = module(**columns, valid=valid)
    flat, offsets = packed(columns, valid)
    assert torch.equal(module(**flat, offsets=offsets), out[valid])
    for row in range(len(valid)):
        alone = {name: column[row : row + 1] for name, column in columns.items()}
        assert torch.equal(module(**alone, valid=valid[row : row + 1])[0], out[row])


def test_without_valid_every_slot_is_real():
    module, columns = encoder(), batch()
    assert torch.equal(module(**columns), module(**columns, valid=torch.ones(3, 5, dtype=torch.bool)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_output_has_the_dtype_of_the_parameters(dtype):
    module, columns = encoder(), batch()
    want = module(**columns)
    got = module.to(dtype)(**columns)
    assert got.dtype == dtype
    # bfloat16 rounds the phases (up to 3, by 2**-8) and then the features (up to 22, by 2**-9 of them); in float64 the
    # features lose only their float32 roundings.
    tolerances = {"rtol": 2**-8, "atol": 2**-6} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 4e-6}
    torch.testing.assert_close(got.double(), want.double(), **tolerances)


rows = st.lists(
    st.lists(st.tuples(st.integers(-2, 5), st.integers(-2, 5), st.booleans()), min_size=6, max_size=6), max_size=4
)


@hypothesis.given(rows=rows, width=st.integers(0, 6), types=st.integers(1, 4), max_len=st.integers(1, 8))
def test_unknown_actions_are_dropped_counted_and_the_rest_close_ranks(rows, width, types, max_len):
    table = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), 6, 3)[:, :width]
    action_type, surface, valid = table[..., 0], table[..., 1], table[..., 2].bool()
    kept = drop_out_of_vocabulary(action_type, surface, valid, num_action_types=types, num_surfaces=3, max_len=max_len)
    assert kept.slots.shape == kept.valid.shape == (len(rows), max_len)
    for row in range(len(rows)):
        slots, of_type, of_surface, of_age = oracles.drop_out_of_vocabulary(
            action_type[row].tolist(), surface[row].tolist(), valid[row].tolist(), types, 3, max_len
        )
        padding = max_len - len(slots)
        assert kept.slots[row].tolist() == slots + [0] * padding
        assert kept.valid[row].tolist() == [True] * len(slots) + [False] * padding
        assert [int(kept.unknown_type[row]), int(kept.unknown_surface[row])] == [of_type, of_surface]
        assert int(kept.truncated[row]) == of_age
    counted = kept.valid.sum(1) + kept.unknown_type + kept.unknown_surface + kept.truncated
    assert torch.equal(counted, valid.sum(1))


def test_extreme_ids_are_out_of_vocabulary():
    extreme = torch.tensor([[-(2**63), 2**63 - 1, 0]])
    kept = drop_out_of_vocabulary(
        extreme, torch.zeros_like(extreme), torch.ones(1, 3).bool(), num_action_types=1, num_surfaces=1, max_len=2
    )
    assert kept.slots.tolist() == [[2, 0]]
    assert kept.unknown_type.tolist() == [2]


def changed(**columns):
    return lambda: encoder()(**{**batch(), **columns})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (changed(item=torch.ones(3, 5, 4)), ValueError, ["item", "(3, 5, 3)", "(3, 5, 4)"]),
        (changed(item=torch.ones(3, 5, 3).long()), TypeError, ["item", "int64"]),
        (changed(action_type=torch.ones(3, 5)), TypeError, ["action_type", "int64", "float32"]),
        (changed(action_type=torch.full((3, 5), 4)), ValueError, ["action_type", "[0, 4)", "got 4", "drop_out_of"]),
        (changed(surface=torch.full((3, 5), -1)), ValueError, ["surface", "[0, 2)", "got -1"]),
        (changed(surface=torch.ones(3, 4).long()), ValueError, ["surface", "(3, 5)", "(3, 4)"]),
        (changed(duration=torch.ones(3, 5).long()), TypeError, ["duration", "int64"]),
        (changed(duration=torch.full((3, 5), -1.0)), ValueError, ["duration", "at least 0", "-1.0"]),
        (changed(duration=torch.full((3, 5), float("inf"))), ValueError, ["duration", "finite", "inf"]),
        (changed(duration=torch.full((3, 5), float("nan"))), ValueError, ["duration", "nan"]),
        (changed(time=torch.ones(3, 5)), TypeError, ["time", "float32"]),
        (changed(time=torch.ones(15).long()), ValueError, ["time", "(B, M)"]),
        (changed(valid=torch.ones(3, 5)), TypeError, ["valid", "bool"]),
        (changed(valid=torch.ones(3, 4).bool()), ValueError, ["valid", "(3, 5)"]),
        (changed(offsets=torch.tensor([0, 15])), ValueError, ["time", "(T)"]),
        (lambda: ActionEncoder(**{**SIZES, "type_dim": 0}, unit="s"), ValueError, ["type_dim", "at least 1"]),
        (lambda: ActionEncoder(**{**SIZES, "num_surfaces": 2.0}, unit="s"), TypeError, ["num_surfaces", "int"]),
        (lambda: ActionEncoder(**SIZES, unit="us"), ValueError, ["unit", "'us'"]),
        (
            lambda: drop_out_of_vocabulary(
                *[torch.ones(1, 2).long()] * 2, torch.ones(1, 2).bool(), num_action_types=1, num_surfaces=1, max_len=0
            ),
            ValueError,
            ["max_len", "at least 1"],
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
