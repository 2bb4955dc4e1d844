"""What no kernel may read."""

import torch


def inside_nan(values):
    """The same numbers between others that are NaN."""
    around = torch.full((values.shape[0] + 2, *values.shape[1:]), torch.nan, dtype=values.dtype, device=values.device)
    around[1:-1] = values
    return around[1:-1]
