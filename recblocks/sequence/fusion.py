"""Early fusion: the candidate joins the user's actions before the sequence model reads them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from recblocks import _checks


def fuse_concat(actions: Tensor, candidate: Tensor) -> Tensor:
    """Put the candidate beside every action: ``out[b, s] = [actions[b, s] | candidate[b]]``.

    What is valid stays as it was; what stands at an invalid slot stands there still, the candidate beside it.

    Args:
        actions: (B, S, A) encoded actions; slot 0 is the most recent.
        candidate: (B, C) the item to be ranked.

    Returns:
        (B, S, A+C).

    Raises:
        TypeError, ValueError: a wrong shape or dtype.

    Example:
        >>> fuse_concat(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[9.0]]))
        tensor([[[1., 2., 9.],
                 [3., 4., 9.]]])

    Source: TransAct, section 3.3.2, "concat".
    """
    _check(actions, candidate)
    beside = candidate[:, None].expand(-1, actions.shape[1], -1)
    return torch.cat([actions, beside], dim=2)


def fuse_append(actions: Tensor, candidate: Tensor, *, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Let the candidate stand behind the actions: ``out[b, S] = [0, …, 0 | candidate[b]]``, always valid.

    An action is ``[type | item]`` and the candidate takes the item's place, so the zeros in front of it are a dummy
    action type. No action moves: the first S slots are those given, and between them and the candidate there may be
    invalid ones.

    Args:
        actions: (B, S, A) encoded actions, the item's numbers last; slot 0 is the most recent.
        candidate: (B, C) the item to be ranked, C ≤ A.
        valid: (B, S) bool, True = a real action.

    Returns:
        (B, S+1, A) the actions and the candidate, and (B, S+1) bool which of them are valid.

    Raises:
        TypeError, ValueError: a wrong shape or dtype, or a candidate wider than an action.

    Example:
        >>> actions, valid = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]), torch.tensor([[True, False]])
        >>> fuse_append(actions, torch.tensor([[9.0]]), valid=valid)
        (tensor([[[1., 2.],
                 [0., 0.],
                 [0., 9.]]]), tensor([[ True, False,  True]]))

    Source: TransAct, section 3.3.2, "append".
    """
    _check(actions, candidate)
    _checks.mask("valid", valid, *actions.shape[:2])
    dummy_dim = actions.shape[2] - candidate.shape[1]
    if dummy_dim < 0:
        wanted = f"(B, at most {actions.shape[2]}), the width of an action"
        raise ValueError(f"candidate must have shape {wanted}, got {_checks.describe(candidate)}")
    last = functional.pad(candidate, (dummy_dim, 0))[:, None]
    return torch.cat([actions, last], dim=1), functional.pad(valid, (0, 1), value=True)


def _check(actions: Tensor, candidate: Tensor) -> None:
    _checks.floating("actions", actions, "B", "S", "A")
    _checks.floating("candidate", candidate, actions.shape[0], "C")
