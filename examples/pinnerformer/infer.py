"""Embed users as of any moment, and items, with a trained model."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.pinnerformer.data import actions_of
from examples.pinnerformer.model import PinnerFormer
from recblocks import Timelines


class Histories:
    """Finds, for any user and moment, the action that was the newest one then."""

    def __init__(self, timelines: Timelines) -> None:
        self.timelines = timelines
        user, index = actions_of(timelines)
        time = timelines.columns["time"][index]
        self.latest = int(time.max())
        self.age_bits = int(self.latest - time.min()).bit_length() + 1
        self.key = (user << self.age_bits) | (self.latest - time)
        self.first = torch.cat([torch.zeros(1, dtype=torch.int64), (timelines.ends - timelines.starts).cumsum(0)])

    def newest(self, rows: Tensor, cuts: Tensor) -> Tensor:
        """(Q,) index into the columns of the newest action at or before each cut; the user's end where none is."""
        age = (self.latest - cuts).clamp(0, (1 << self.age_bits) - 1)
        place = torch.searchsorted(self.key, (rows << self.age_bits) | age)
        return self.timelines.starts[rows] + (place - self.first[rows]).minimum(self.first[rows + 1] - self.first[rows])


@torch.no_grad()
def embed_users(
    model: PinnerFormer, histories: Histories, rows: Tensor, cuts: Tensor, *, max_len: int, batch_size: int = 64
) -> Tensor:
    """(Q, dim) embeddings from the newest ``max_len`` actions up to each cut; zeros for who has none by then."""
    timelines = histories.timelines
    newest = histories.newest(rows, cuts)
    lengths = (timelines.ends[rows] - newest).clamp(max=max_len)
    embedded = torch.zeros(len(rows), model.items.out_dim)
    device = model.content.device
    some = torch.nonzero(lengths > 0).squeeze(1)
    for batch in some[lengths[some].argsort()].split(batch_size):  # of like length, so that little is padded
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths[batch].cumsum(0)])
        row = torch.repeat_interleave(lengths[batch])
        index = torch.arange(int(offsets[-1])) - offsets[row] + newest[batch][row]
        columns = {name: column.to(device) for name, column in model_columns(timelines, index).items()}
        slots = model.embed_slots(columns, offsets.to(device))
        embedded[batch] = slots[offsets[:-1].to(device)].cpu()
    return embedded


@torch.no_grad()
def embed_items(model: PinnerFormer, rows: Tensor) -> Tensor:
    """(R, dim) embeddings of items."""
    blocks = rows.to(model.content.device).split(8192)
    return torch.cat([model.items(model.content[block]) for block in blocks]).cpu()


def model_columns(timelines: Timelines, index: Tensor) -> dict[str, Tensor]:
    """What the model reads of the actions ``index``."""
    return timelines.gather(index, ("row", "action_type", "surface", "duration", "time"))
