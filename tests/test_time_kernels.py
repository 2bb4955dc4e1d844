"""Triton's kernel of the time encoding against the formula and plain torch; on a GPU, or else in its interpreter."""

import hopper
import oracles
import pytest
import torch

from recblocks import ActionEncoder
from recblocks.features import time as time_module
from recblocks.features.time import PINNERFORMER_PERIODS, gap_to_next_older, log_spaced_periods, time_since_latest
from recblocks.kernels.time_waves import dispatch

kernels = pytest.importorskip("recblocks.kernels.time_waves.triton", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
BETWEEN = log_spaced_periods(32, shortest=1, longest=28 * 86400)
USES = PINNERFORMER_PERIODS, BETWEEN, BETWEEN
TOLERANCE = 2e-6


def frequencies_of(periods, unit="ms"):
    return torch.tensor(time_module._fixed_point_frequencies(periods, unit), device=DEVICE)


def a_batch(rows, slots, some_valid, seed=0):
    """Times of today, newest first, the ends of int64 where invalid; phases of a few turns."""
    generator = torch.Generator().manual_seed(seed)
    ago = torch.randint(365 * 86_400_000, (rows, slots), generator=generator).sort(1).values
    time, valid = 1_760_000_000_000 - ago, None
    if some_valid:
        valid = torch.rand(rows, slots, generator=generator) < torch.rand(rows, 1, generator=generator)
        time = torch.where(valid, time, -(2**63))
    phases = [7 * torch.randn(2 * len(periods), generator=generator) for periods in USES]
    return (
        time.to(DEVICE),
        None if valid is None else valid.to(DEVICE),
        [frequencies_of(periods) for periods in USES],
        [phase.to(DEVICE) for phase in phases],
    )


def in_torch(time, valid, frequencies, phases, unit="ms"):
    absolute = time if valid is None else time.masked_fill(~valid, 0)
    spans = absolute, time_since_latest(time, valid), gap_to_next_older(time, valid)
    each = zip(spans, frequencies, phases, strict=True)
    return torch.cat([time_module._encode_in_torch(span, *how, unit) for span, *how in each], -1)


@pytest.mark.parametrize("some_valid", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1), (5, 3), (2, 16), (3, 17), (2, 64), (1, 65), (2, 131)])
def test_all_three_spans_are_those_of_plain_torch(shape, some_valid):
    time, valid, frequencies, phases = a_batch(*shape, some_valid)
    got = dispatch.encode_spans(time, valid, frequencies, phases, 1000, 0)
    # Both are within half of it where the phase is small; plain torch adds a phase of up to 30 in float32, off by 1e-6.
    torch.testing.assert_close(
        got, in_torch(time, valid, frequencies, [phase.double() for phase in phases]).float(), rtol=0, atol=TOLERANCE
    )


def test_every_feature_is_within_2e_6_of_the_formula():
    time, valid, frequencies, phases = a_batch(2, 19, True)
    got = dispatch.encode_spans(time, valid, frequencies, phases, 1000, 0).cpu()
    for row, (times, real) in enumerate(zip(time.tolist(), valid.tolist(), strict=True)):
        spans = [
            [t if one else 0 for t, one in zip(times, real, strict=True)],
            oracles.time_since_latest(times, real),
            oracles.gap_to_next_older(times, real),
        ]
        for slot in range(len(times)):
            want = [
                number
                for span, periods, phase in zip(spans, USES, phases, strict=True)
                for number in oracles.log_periodic_features(span[slot], periods, phase.tolist(), 1000)
            ]
            want = torch.tensor(want, dtype=torch.float64)
            torch.testing.assert_close(got[row, slot].double(), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (37,), (3, 50)])
@pytest.mark.parametrize("phased", [False, True])
def test_times_alone(shape, phased):
    t = torch.randint(-(2**62), 2**62, shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for periods in ([60.0], PINNERFORMER_PERIODS, log_spaced_periods(150, shortest=1, longest=1e6)):
        phase = torch.randn(2 * len(periods), device=DEVICE) if phased else None
        for quarters in range(5):
            got = dispatch._encode_times_on_cuda(t, frequencies_of(periods), phase, 1000, quarters)
            ahead = torch.zeros(2 * len(periods), device=DEVICE) if phase is None else phase
            ahead = ahead.double() + quarters * torch.pi / 2
            want = time_module._encode_in_torch(t, frequencies_of(periods), ahead, "ms").float()
            torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")  # the interpreter's inf * 0
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_phase_that_is_no_number_is_seen_in_its_own_wave(wrong):
    time, valid, frequencies, phases = a_batch(2, 5, True)
    want = dispatch.encode_spans(time, valid, frequencies, phases, 1000, 0)
    phases[1][6] = wrong
    got = dispatch.encode_spans(time, valid, frequencies, phases, 1000, 0)
    assert got[..., 25 + 6].isnan().all()
    got[..., 25 + 6] = want[..., 25 + 6]
    assert torch.equal(got, want)


def test_an_action_encoder_takes_it_and_gives_what_it_gave(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    encoder = ActionEncoder(item_dim=3, num_action_types=4, num_surfaces=2, type_dim=2, surface_dim=2, unit="ms")
    encoder.to(DEVICE)
    with torch.no_grad():
        for one in encoder.parameters():
            one.copy_(torch.randn(one.shape, generator=generator))
    time, valid, *_ = a_batch(3, 21, True)
    actions = {
        "item": torch.randn(3, 21, 3, generator=generator),
        "action_type": torch.randint(4, (3, 21), generator=generator),
        "surface": torch.randint(2, (3, 21), generator=generator),
        "duration": torch.rand(3, 21, generator=generator),
    }
    actions = {name: one.to(DEVICE) for name, one in actions.items()} | {"time": time, "valid": valid}
    weights = torch.randn(3, 21, encoder.out_dim, generator=generator).to(DEVICE)
    found = []
    for in_one in (True, False):
        monkeypatch.setattr(time_module, "in_one_kernel", lambda *_, in_one=in_one: in_one)
        out = encoder(**actions)
        found.append((out, torch.autograd.grad((out * weights).sum(), list(encoder.parameters()))))
    (got, slopes), (want, want_slopes) = found
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)
    # Sums of 63 waves, each within the tolerance, by weights below 4.
    torch.testing.assert_close(slopes, want_slopes, rtol=1e-6, atol=63 * 4 * TOLERANCE)


@pytest.mark.parametrize("some_valid", [False, True])
def test_the_operator_is_one_of_torch(some_valid):
    time, valid, frequencies, phases = a_batch(2, 5, some_valid)
    for wanted in (False, True):
        phases = [phase.requires_grad_(wanted) for phase in phases]
        torch.library.opcheck(dispatch.encode_spans, (time, valid, frequencies, phases, 1000, 0))


def test_what_takes_one_kernel(monkeypatch):
    monkeypatch.setattr(dispatch, "on_nvidia", lambda _: True)
    time, phase = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4)
    assert dispatch.in_one_kernel(time, [phase, phase.bfloat16()])
    assert not dispatch.in_one_kernel(time.double(), [phase])
    assert not dispatch.in_one_kernel(time, [phase, None])
    assert not dispatch.in_one_kernel(time, [phase, phase.double()])
    monkeypatch.undo()
    assert not dispatch.on_nvidia([time])


BUILDING = """
import hopper
from recblocks.kernels.time_waves import triton as kernel

TYPES = {"out": "*fp32", "time": "*i64", "valid": "*u8"}
TYPES |= dict.fromkeys(("per_second", "quarters", "num_slots"), "i32")
for kinds, periods, phased, masked in (
    ((0, 1, 2), (12, 32, 32), (True, True, True), True),
    ((0, 1, 2), (12, 32, 32), (True, True, True), False),
    ((0,), (1,), (False,), False),
    ((0,), (12,), (True,), False),
    ((0,), (300,), (True,), False),
):
    phases = tuple("*fp32" if one else "*i64" for one in phased)
    fixed = kernel.sizes_of(kinds, periods, phased) | {"MASKED": masked} | ({} if masked else {"valid": None})
    hopper.build(kernel.encode, TYPES | {"frequencies": ("*i64",) * len(kinds), "phases": phases}, fixed)
"""


def test_the_kernel_builds_for_a_hopper_gpu_and_spills_nothing(tmp_path):
    built = hopper.run(BUILDING, tmp_path)
    assert len(built) == 5
    assert not any(one.spilled for one in built)
