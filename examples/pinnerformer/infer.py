"""Embed users as of any moment, and items, with a trained model.

``python -m examples.pinnerformer.infer`` writes them to two Parquet files.
"""

from __future__ import annotations

import dataclasses
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from torch import Tensor

from examples.pinnerformer import checkpoint
from examples.pinnerformer.data import DataOptions, Dataset, load
from examples.pinnerformer.model import ModelOptions, PinnerFormer, build_model
from recblocks import Timelines


@dataclasses.dataclass(frozen=True)
class InferOptions:
    """Embed the users to train on and to judge, and the items to retrieve, with a trained model."""

    data: tyro.conf.OmitArgPrefixes[DataOptions] = dataclasses.field(default_factory=DataOptions)
    checkpoint: pathlib.Path = pathlib.Path("build/pinnerformer/pinnerformer.pt")
    """What training wrote, on the same data."""
    out: pathlib.Path = pathlib.Path("build/pinnerformer")
    """Folder of users.parquet (user, embedding) and items.parquet (item, embedding)."""
    time: int | None = None
    """Read users' actions up to this time, in the timelines' unit, not before the end of training, which is the
    default. The items are those known at the end of training."""
    device: str = "cpu"
    threads: int = 1
    """CPU threads."""


def main(options: InferOptions) -> None:
    """Load, embed and write."""
    torch.set_num_threads(options.threads)
    data = load(options.data)
    model, max_len = load_model(options.checkpoint, data)
    model.to(options.device)
    time = data.cut if options.time is None else options.time
    if time < data.cut:
        raise ValueError(
            f"time must be at least {data.cut}: the items' content knows what happened by then, got {time}"
        )
    ids, users, without = [], [], 0
    for timelines in (data.train, data.judged):
        histories, rows = Histories(timelines), torch.arange(len(timelines))
        cuts = torch.full_like(rows, time)
        known = histories.newest(rows, cuts) < timelines.ends
        embedded = embed_users(model, histories, rows[known], cuts[known], max_len=max_len)
        ids, users, without = [*ids, timelines.users[known]], [*users, embedded], without + int((~known).sum())
    options.out.mkdir(parents=True, exist_ok=True)
    _write(options.out / "users.parquet", "user", torch.cat(ids), torch.cat(users))
    _write(options.out / "items.parquet", "item", data.items[data.corpus], embed_items(model, data.corpus))
    print(f"Wrote {sum(map(len, ids))} users and {len(data.corpus)} items to {options.out}; ", end="")
    print(f"{without} users have no action up to {time} and are left out.")


def load_model(path: pathlib.Path, data: Dataset) -> tuple[PinnerFormer, int]:
    """The model of a checkpoint, and how many of a user's newest actions it reads."""
    state = checkpoint.load(path)
    trained_on = {name: state["options"].get(name) for name in data.options}
    if trained_on != data.options:
        raise ValueError(f"{path} was trained on {trained_on}, got {data.options}")
    names = [field.name for field in dataclasses.fields(ModelOptions)]
    sizes = ModelOptions(**{name: state["options"][name] for name in names})
    model = build_model(data, sizes)
    model.load_state_dict(state["model"])
    return model.eval(), sizes.max_len


def _write(path: pathlib.Path, name: str, ids: Tensor, embedded: Tensor) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embedded.flatten().numpy()), embedded.shape[1])
    partial = path.with_suffix(".partial")
    pq.write_table(pa.table({name: pa.array(ids.numpy()), "embedding": vectors}), partial)
    partial.replace(path)


class Histories:
    """Finds, for any user and moment, the action that was the newest one then."""

    def __init__(self, timelines: Timelines) -> None:
        self.timelines = timelines
        user, index = timelines.actions()
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


if __name__ == "__main__":
    main(tyro.cli(InferOptions, description=__doc__))
