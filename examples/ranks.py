"""What a script does where torchrun may have started several of it."""

from __future__ import annotations

import torch.distributed as dist


def is_first_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_ranks() -> None:
    """Go on when every rank is here."""
    if dist.is_initialized():
        dist.barrier()
