"""Collectives over ranks whose row counts differ; without a process group every rank is alone."""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
from torch import Tensor

from recblocks import _checks


def group_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks in the group (None: the default group), 1 where no process group is initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def all_gather_ragged(x: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, list[int]]:
    """Concatenate every rank's rows in rank order; no gradient flows through it.

    Args:
        x: (R, ...) this rank's rows; R may differ between ranks and be 0, the other dimensions and the dtype may not.
            The group's backend must send the dtype: gloo takes no int16.
        group: the ranks that take part; None is the default group.

    Returns:
        The rows of all ranks (sum of R, ...), and each rank's number of rows. Shapes are known on the host only, so on
        a GPU this waits for the counts.

    Raises:
        ValueError: on every rank, where ranks differ in dtype or in a dimension after the first.
    """
    x = x.detach()
    world = group_size(group)
    if world == 1:
        return x, [x.shape[0]]
    kind = zlib.crc32(f"{x.dtype} {tuple(x.shape[1:])}".encode())
    headers = torch.empty(world, 2, dtype=torch.int64, device=x.device)
    own = torch.tensor([x.shape[0], kind], dtype=torch.int64, device=x.device)
    dist.all_gather(list(headers), own, group=group)
    sizes, kinds = headers.t().tolist()
    if any(other != kind for other in kinds):
        raise ValueError(f"x must have one dtype and shape[1:] on all ranks, got {_checks.describe(x)} on this one")
    longest = max(sizes)
    if longest == 0:
        return x, sizes
    padded = x.new_zeros(longest, *x.shape[1:])
    padded[: x.shape[0]] = x
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)]), sizes
