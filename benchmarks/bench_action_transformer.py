"""One user's candidates beside the user's part done once, against a row for every candidate; evaluation, no gradient.

Every form sees the same users in turn, each with another number of actions. The rows are also timed in chunks as small
as the shared form's, so that what sharing gains can be told from what the cache gains.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks._timing import interleaved, table
from recblocks import ActionTransformer

NUM_CANDIDATES, SLOTS, ITEM_DIM, TYPE_DIM, NUM_TYPES, NUM_USERS = 1000, 100, 32, 32, 6, 4
CHUNK = 26  # what encode_candidates takes at a time at 100 slots and one head
TOLERANCE = 1e-5

User = tuple[Tensor, Tensor, Tensor, Tensor]


def users() -> list[User]:
    """Item, action type and valid of one user, and the candidates."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(1, SLOTS, ITEM_DIM, generator=generator),
            torch.randint(NUM_TYPES, (1, SLOTS), generator=generator),
            torch.arange(SLOTS)[None] < SLOTS - 20 * number,
            torch.randn(NUM_CANDIDATES, ITEM_DIM, generator=generator),
        )
        for number in range(NUM_USERS)
    ]


def rows(model: ActionTransformer, user: User) -> Tensor:
    item, action_type, valid, candidates = user
    num = len(candidates)
    actions = item.expand(num, -1, -1), action_type.expand(num, -1)
    out, _ = model(*actions, candidates, valid=valid.expand(num, -1))
    return out


def rows_in_chunks(model: ActionTransformer, user: User) -> Tensor:
    *actions, candidates = user
    return torch.cat([rows(model, (*actions, some)) for some in candidates.split(CHUNK)])


def shared(model: ActionTransformer, user: User) -> Tensor:
    item, action_type, valid, candidates = user
    return model.encode_candidates(model.encode_user(item, action_type, valid=valid), candidates)


FORMS: dict[str, Callable[[ActionTransformer, User], Tensor]] = {
    "a row a candidate": rows,
    "rows in chunks": rows_in_chunks,
    "the user once": shared,
}


def require_equal(model: ActionTransformer, everybody: list[User]) -> float:
    """The largest difference of a float32 form from float64 rows; exits where it exceeds the tolerance."""
    worst = 0.0
    for user in everybody:
        item, action_type, valid, candidates = user
        exact = rows_in_chunks(model.double(), (item.double(), action_type, valid, candidates.double()))
        model.float()
        worst = max([worst, *((form(model, user) - exact).abs().max().item() for form in FORMS.values())])
    if not worst <= TOLERANCE:
        raise SystemExit(f"wrong by {worst:.2g} (allowed {TOLERANCE:.2g}): not timed")
    return worst


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    model = ActionTransformer(item_dim=ITEM_DIM, num_action_types=NUM_TYPES, type_dim=TYPE_DIM).eval()
    everybody = users()
    apart = require_equal(model, everybody)
    turns = {name: itertools.cycle(everybody) for name in FORMS}
    seconds = interleaved({name: lambda name=name: FORMS[name](model, next(turns[name])) for name in FORMS})
    table(
        f"one user's {NUM_CANDIDATES} candidates, S = {SLOTS}, d = {model.out_dim}, {torch.get_num_threads()} threads, "
        f"apart by {apart:.1g} (bar: the user once 1.4 times)",
        ("form", "seconds", "times faster"),
        [(name, value, seconds["a row a candidate"] / value) for name, value in seconds.items()],
    )


if __name__ == "__main__":
    main()
