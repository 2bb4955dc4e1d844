"""How often each id was seen, in fixed memory: the count-min sketch behind log q and table admission."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from recblocks import _checks
from recblocks._distributed import group_size
from recblocks._hashing import FIRST, LOW_32, mix, signed, splitmix
from recblocks.kernels.count_min import dispatch as count_min

_SIGHTING = 1 << 16  # fixed point: what one sighting adds to a counter
_MOST_COUNTERS = (1 << 31) - 1  # in a row
_MOST_SIGHTINGS = 2.0**46  # beyond it a counter would leave the exact range of int64 and float64
_CHUNK = 5 << 14  # hashes at a time on a CPU, so that they stay in cache
_PRECISION = 14  # log2 of HyperLogLog++'s registers: 16 KiB, a standard error of 0.8 %


class CountMinSketch(nn.Module):
    """Counts int64 ids in ``depth`` x ``width`` counters; never too low, rarely much too high.

    count(v) <= query(v), and query(v) > count(v) + (e / width) x total with a probability of at most exp(-depth).

    Every id has one counter in each row, chosen by a hash of the id, the row and the seed; the smallest of its counters
    is the answer. Counters are int64 buffers in fixed point (one sighting is 2**16), so adding is exact, in any order,
    and the same on every device, in every process and run.

    ``pending`` holds what came since the last `all_reduce`, ``synced`` everything before; an answer is their sum.

    Args:
        width: counters in a row, below 2**31.
        depth: rows.
        seed: chooses the hash functions, from 0 to 2**63 - 1. Sketches of another seed do not merge.
        device: where the counters live.

    Note:
        Answers are exact up to a total of 2**46 sightings; ``counts`` and merges that pass it are refused where they
        can be read. `all_reduce` does not look: keep the sum over ranks below it, with `decay` if need be.

        DistributedDataParallel's ``broadcast_buffers=True``, its default, overwrites every rank's ``pending`` with rank
        0's before a forward. Keep the sketch outside of the wrapped module, or pass ``broadcast_buffers=False``.

    Example:
        >>> sketch = CountMinSketch(width=1000, depth=4)
        >>> sketch.update(torch.tensor([7, 7, -3]))
        >>> sketch.query(torch.tensor([7, -3, 5]))
        tensor([2., 1., 0.], dtype=torch.float64)
        >>> sketch.total
        tensor(3., dtype=torch.float64)

    Source:
        Cormode and Muthukrishnan 2005, cited by PinnerFormer 3.3.2 for the sampling probability of its loss.
    """

    synced: Tensor
    pending: Tensor
    synced_total: Tensor
    pending_total: Tensor

    def __init__(
        self, width: int, depth: int, *, seed: int = 0, device: torch.device | str | int | None = None
    ) -> None:
        super().__init__()
        _checks.positive_int("width", width)
        _checks.positive_int("depth", depth)
        _checks.number("width", width, at_most=_MOST_COUNTERS)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {_checks.describe(seed)}")
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {seed}")
        self.width, self.depth, self.seed = width, depth, seed
        self.register_load_state_dict_pre_hook(refuse_others)  # type: ignore[no-untyped-call]
        multipliers = [signed(splitmix(seed, row + 1) | 1) for row in range(0, depth, 2)]
        self._hash = signed(splitmix(seed, 0)), multipliers, width, depth
        for part in ("synced", "pending"):
            self.register_buffer(part, torch.zeros(depth, width, dtype=torch.int64, device=device))
            self.register_buffer(f"{part}_total", torch.zeros((), dtype=torch.int64, device=device))

    @classmethod
    def from_error(
        cls, epsilon: float, delta: float, *, seed: int = 0, device: torch.device | str | int | None = None
    ) -> CountMinSketch:
        """Make the sketch that is over by more than ``epsilon`` x total with a probability of at most ``delta``.

        Args:
            epsilon: error as a share of all sightings, above e / 2**31, below 1; width = ceil(e / epsilon).
            delta: probability that one answer's error is larger, in (0, 1); depth = ceil(ln(1 / delta)).
            seed: see the class.
            device: see the class.

        Returns:
            An empty sketch.

        Raises:
            ValueError: where ``epsilon`` or ``delta`` is out of its range.

        Example:
            >>> CountMinSketch.from_error(0.001, 0.01)
            CountMinSketch(width=2719, depth=5, seed=0)
        """
        _checks.number("epsilon", epsilon, above=math.e / _MOST_COUNTERS, below=1)
        _checks.number("delta", delta, above=0, below=1)
        return cls(math.ceil(math.e / epsilon), math.ceil(-math.log(delta)), seed=seed, device=device)

    @classmethod
    def from_stream(
        cls,
        batches: Iterable[Tensor],
        *,
        relative_error: float,
        delta: float,
        seed: int = 0,
        device: torch.device | str | int | None = None,
    ) -> CountMinSketch:
        """Make a sketch wide enough for a stream's distinct ids, which one pass of HyperLogLog++ counts to about 0.8 %.

        width = ceil(e x distinct / relative_error), so that an item of mean count (total / distinct) is over by more
        than ``relative_error`` of its count with a probability of at most ``delta``. The stream is only measured: the
        sketch comes back empty. Needs the package ``datasketch``.

        Args:
            batches: int64 id tensors of any shape, at least one id in all.
            relative_error: r, above 0.
            delta: in (0, 1).
            seed: see the class.
            device: see the class.

        Returns:
            An empty sketch.

        Raises:
            ImportError: without ``datasketch``.
            ValueError: where there is no id, or a number is out of its range.

        Example:
            >>> ids = torch.arange(1000)
            >>> CountMinSketch.from_stream([ids, ids], relative_error=0.5, delta=0.05).width in range(5200, 5700)
            True
        """
        _checks.number("relative_error", relative_error, above=0)
        _checks.number("delta", delta, above=0, below=1)
        distinct = _count_distinct(batches)
        if distinct < 1:
            raise ValueError("batches must hold at least one id, got none")
        least = math.e * distinct / _MOST_COUNTERS
        _checks.number("relative_error", relative_error, above=least)
        return cls(math.ceil(math.e * distinct / relative_error), math.ceil(-math.log(delta)), seed=seed, device=device)

    def reset_parameters(self) -> None:
        """Forget everything."""
        for counters in self.buffers(recurse=False):
            counters.zero_()

    def update(self, ids: Tensor, counts: Tensor | None = None) -> None:
        """Add sightings; in ``eval()`` this does nothing.

        Call it before the batch is read, so that every id of the batch has at least its own sighting.

        Args:
            ids: (...) int64, any value; an id may repeat.
            counts: (...) sightings of each id, int64, or floating (rounded up to a multiple of 2**-16); None: one each.

        Raises:
            TypeError: for another dtype.
            ValueError: for another shape, and, where the numbers can be read, for a count that is negative or not
                finite or takes the total past 2**46.
        """
        _checks.integers("ids", ids)
        if counts is not None:
            is_float = isinstance(counts, Tensor) and counts.is_floating_point()
            (_checks.floating if is_float else _checks.integers)("counts", counts, *ids.shape)
        self._check_device(ids)
        if not self.training:
            return
        if counts is not None and _checks.readable(counts) and counts.numel():
            self._check_counts(counts)
        ids, amounts = ids.flatten(), None if counts is None else _fixed_point(counts.flatten())
        if _checks.readable(ids):
            size = self._chunk_size(ids)
            added = torch.full((self.depth, size), _SIGHTING)
            hashed = np.empty((self.depth, size), np.uint64)  # one for all chunks: fresh memory costs more than hashing
            for start in range(0, ids.shape[0], size):
                some = slice(start, start + size)
                buckets = _numpy_buckets(ids[some], *self._hash, out=hashed)
                if amounts is not None:
                    added[:, : buckets.shape[1]] = amounts[some]
                self.pending.scatter_add_(1, buckets, added)  # the threads share the rows
        elif count_min.runs_on(ids):
            count_min.add(ids, amounts, self.pending, self.pending_total, *self._hash[:2], _SIGHTING)
            return
        else:
            one = torch.full_like(ids, _SIGHTING) if amounts is None else amounts
            self.pending.scatter_add_(1, _torch_buckets(ids, *self._hash), one.expand(self.depth, -1))
        self.pending_total.add_(ids.shape[0] * _SIGHTING if amounts is None else amounts.sum())

    def query(self, ids: Tensor) -> Tensor:
        """Answer how often each id was seen, in sightings; never too low.

        Args:
            ids: (...) int64.

        Returns:
            (...) float64, between 0 and ``total``; whole counts are exact up to 2**46.
        """
        _checks.integers("ids", ids)
        self._check_device(ids)
        flat = ids.flatten()
        if _checks.readable(flat) and flat.shape[0] > (size := self._chunk_size(flat)):
            return torch.cat([self._answer(some) for some in torch.split(flat, size)]).view(ids.shape)
        return self._answer(flat).view(ids.shape)

    def forward(self, ids: Tensor) -> Tensor:
        """Answer like `query`."""
        return self.query(ids)

    @property
    def total(self) -> Tensor:
        """All sightings, a 0-dim float64 tensor on the sketch's device."""
        return (self.synced_total + self.pending_total).double() / _SIGHTING

    def decay(self, factor: float) -> None:
        """Multiply every counter and the total by ``factor``, rounding up to the next 2**-16: never too low.

        Exact integer arithmetic. On several ranks, call it on all of them at the same step.

        Args:
            factor: in [0, 1].
        """
        _checks.number("factor", factor, at_least=0, at_most=1)
        for counters in self.buffers(recurse=False):
            counters.copy_(_multiply_rounding_up(counters, factor))

    def merge(self, other: CountMinSketch) -> None:
        """Add another sketch's sightings, as if this one had seen both streams.

        What the other had shared with its ranks (``synced``) counts as shared here too, so merge it on every rank; what
        it had not (``pending``) is shared by this sketch's next `all_reduce`.

        Args:
            other: a sketch of the same width, depth and seed; it stays as it is.

        Raises:
            TypeError: where ``other`` is no CountMinSketch.
            ValueError: where width, depth or seed differ, and, where it can be read, for a total past 2**46.
        """
        if not isinstance(other, CountMinSketch):
            raise TypeError(f"other must be a CountMinSketch, got {_checks.describe(other)}")
        if (other.width, other.depth, other.seed) != (self.width, self.depth, self.seed):
            raise ValueError(f"other must be a {self!r} like this one, got {other!r}")
        if _checks.readable(self.synced) and _checks.readable(other.synced):
            self._check_added("other", other.total.item())
        for mine, theirs in zip(self.buffers(recurse=False), other.buffers(recurse=False), strict=True):
            mine.add_(theirs.to(mine.device))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add what every rank saw since the last call, so that all ranks answer for all; twice is once.

        Call it on every rank after `update` and before the batch is read. Afterwards the counters are bit-identical on
        all ranks, so one rank's checkpoint serves any number of ranks. A checkpoint taken between `update` and
        `all_reduce` holds that rank's ``pending`` alone. Where every rank updates with the ids of the whole batch,
        there is nothing to share, and this must not be called.

        Args:
            group: the ranks, always the same; None is the default group. Without a process group the rank is alone.
        """
        if group_size(group) > 1:
            dist.all_reduce(self.pending, group=group)
            dist.all_reduce(self.pending_total, group=group)
        self.synced.add_(self.pending)
        self.synced_total.add_(self.pending_total)
        self.pending.zero_()
        self.pending_total.zero_()

    def get_extra_state(self) -> Tensor:
        """Save the shape and the seed beside the counters."""
        return torch.tensor([self.width, self.depth, self.seed], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: counters of another shape or seed are refused before any is loaded."""

    def extra_repr(self) -> str:
        """Name the shape and the seed."""
        return f"width={self.width}, depth={self.depth}, seed={self.seed}"

    def _answer(self, ids: Tensor) -> Tensor:
        if count_min.runs_on(ids):
            found: Tensor = count_min.answer(ids, self.synced, self.pending, *self._hash[:2], _SIGHTING)
            return found
        buckets = (_numpy_buckets if _checks.readable(ids) else _torch_buckets)(ids, *self._hash)
        counters = self.synced.gather(1, buckets) + self.pending.gather(1, buckets)
        smallest: Tensor = functools.reduce(torch.minimum, counters)  # amin(0) is 30 times slower on a CPU
        return smallest.double() / _SIGHTING

    def _chunk_size(self, ids: Tensor) -> int:
        return max(1, min(ids.shape[0], _CHUNK // self.depth))

    def _check_device(self, ids: Tensor) -> None:
        if ids.device != self.pending.device:
            raise ValueError(f"ids must be on {self.pending.device} like the sketch, got {ids.device}")

    def _check_counts(self, counts: Tensor) -> None:
        lowest, highest = counts.min().item(), counts.max().item()
        if not (lowest >= 0 and highest < math.inf):
            raise ValueError(f"counts must be finite and at least 0, got values from {lowest} to {highest}")
        self._check_added("counts", counts.double().sum().item())

    def _check_added(self, name: str, added: float) -> None:
        if self.total.item() + added > _MOST_SIGHTINGS:
            raise ValueError(
                f"{name} must keep the total at 2**46 or below, got {added:g} beyond {self.total.item():g}"
            )


def refuse_others(sketch: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Refuse counters of another shape or seed, whose answers would be nonsense, before any of them is copied."""
    assert isinstance(sketch, CountMinSketch)
    state = state_dict.get(prefix + "_extra_state")
    if state is None:
        return
    width, depth, seed = state.tolist()
    if (width, depth, seed) != (sketch.width, sketch.depth, sketch.seed):
        got = f"width={width}, depth={depth}, seed={seed}"
        raise ValueError(f"state_dict must be of a {sketch!r}, got one of {got}")


def _fixed_point(counts: Tensor) -> Tensor:
    """Sightings as multiples of 2**-16, rounded up."""
    if counts.is_floating_point():
        return (counts.double() * _SIGHTING).ceil().to(torch.int64)
    return counts * _SIGHTING


def _multiply_rounding_up(counters: Tensor, factor: float) -> Tensor:
    """Exactly ceil(counters x factor) for counters in [0, 2**62], factor in [0, 1] rounded up to a multiple of 2**-62.

    Long multiplication in 31-bit digits: no intermediate value passes 2**63 - 1.
    """
    digit = (1 << 31) - 1
    scaled = math.ceil(factor * 2.0**62)  # a power of two: the product is exact
    high_factor, low_factor = scaled >> 31, scaled & digit
    high, low = counters >> 31, counters & digit
    carry = (low * low_factor + digit) >> 31
    middle = high * low_factor + low * high_factor + carry
    return high * high_factor + ((middle + digit) >> 31)


def _torch_buckets(ids: Tensor, offset: int, multipliers: list[int], width: int, depth: int) -> Tensor:
    """Hash by floor(u x width / 2**32), u 32 bits of ``mixed * multiplier``; one product serves two rows."""
    mixed = mix(ids, offset)
    hashed = []
    for multiplier in multipliers:
        product = mixed * multiplier
        hashed += [(product >> 32) & LOW_32, product & LOW_32]
    return torch.stack(hashed[:depth]).mul_(width).bitwise_right_shift_(32)


def _numpy_buckets(
    ids: Tensor,
    offset: int,
    multipliers: list[int],
    width: int,
    depth: int,
    out: npt.NDArray[np.uint64] | None = None,
) -> Tensor:
    """Hash to the same buckets on a CPU, 2.5 times faster: numpy has unsigned shifts and cheaper calls."""
    half = np.uint64(32)
    mixed = ids.numpy().view(np.uint64) + np.uint64(offset % (1 << 64))
    mixed ^= mixed >> half
    mixed *= np.uint64(FIRST)
    mixed ^= mixed >> np.uint64(29)
    hashed = np.empty((depth, len(mixed)), np.uint64) if out is None else out[:, : len(mixed)]
    for row in range(0, depth, 2):
        product = mixed * np.uint64(multipliers[row // 2] % (1 << 64))
        np.right_shift(product, half, out=hashed[row])
        if row + 1 < depth:
            np.bitwise_and(product, np.uint64(LOW_32), out=hashed[row + 1])
    hashed *= np.uint64(width)
    hashed >>= half
    return torch.from_numpy(hashed.view(np.int64))


def _count_distinct(batches: Iterable[Tensor]) -> float:
    """About how many different ids there are: registers filled in vectors, read by datasketch's HyperLogLog++."""
    datasketch = _checks.optional("datasketch", "pip install 'recblocks[sketch]'")
    registers = torch.zeros(1 << _PRECISION, dtype=torch.int64)
    for ids in batches:
        _checks.integers("batches", ids)
        hashed = mix(mix(ids.flatten().cpu(), 1), 2)
        rest = (hashed >> _PRECISION) & ((1 << (64 - _PRECISION)) - 1)
        bit_length = torch.frexp(rest.double()).exponent  # exact, for rest < 2**53
        rank = (64 - _PRECISION + 1) - bit_length.to(torch.int64)
        registers.scatter_reduce_(0, hashed & ((1 << _PRECISION) - 1), rank, "amax")
    return float(datasketch.HyperLogLogPlusPlus(reg=registers.to(torch.int8).numpy()).count())
