"""
PinnerFormer on one page
========================

From a log of actions to user embeddings that are judged on the two weeks after the training data ends: timelines, the
dense all-action objective, the causal encoder, mixed negatives with logQ, and recall. Learned from scratch in a few
hundred steps, its ten nearest items hold more of what users do next than the most popular items, and than the items
nearest to the mean of what they did. Seed 0; the data is a simulated world whose users have interests that last for
weeks.
"""

import dataclasses
import functools

import matplotlib.pyplot as plt
import torch
from torch import nn

import recblocks

torch.manual_seed(0)
world = dataclasses.replace(recblocks.INTERESTS, num_users=1000, num_items=2000)
seen = recblocks.simulate(world, seed=0)
day = 86_400_000  # the world's times are milliseconds
cut = int(seen.actions["time"].min()) + (world.days - 14) * day
log = {name: seen.actions[name] for name in ("user", "time", "item", "action_type", "surface", "duration")}
timelines = recblocks.Timelines.from_arrays(unit=seen.unit, **log)
train, judged = recblocks.split_by_user(timelines, held_out=0.2)

# %%
# The model: what an action looks like, the encoder of a user's actions, and the item tower, which reads the content
# embedding.

dim, max_len, num_items = 32, 32, world.num_items
content = seen.items.embedding * dim**0.5  # numbers about as large as the other features'


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.actions = recblocks.ActionEncoder(
            item_dim=dim, num_action_types=4, num_surfaces=3, type_dim=8, surface_dim=8, unit="ms"
        )
        self.user = recblocks.CausalSequenceEncoder(
            self.actions.out_dim, dim, hidden_dim=64, num_layers=1, num_heads=4, max_len=max_len
        )
        self.item = recblocks.ItemEncoder(dim, dim, hidden_dim=64)
        self.temperature = recblocks.LearnedTemperature(0.05)

    def embed_users(self, action, valid):
        names = ("action_type", "surface", "duration", "time")
        rows = self.actions(content[action["item"]], *[action[name] for name in names], valid=valid)
        return self.user(rows, valid=valid)


# %%
# Each batch holds pairs of a slot and a later action: random slots of a sequence predict a random positive of the
# four weeks that follow. No label is later than the cut.

objective = functools.partial(
    recblocks.dense_all_action, max_len=max_len, positive=recblocks.positive_engagement, window_days=28.0, max_labels=8
)
batches = recblocks.TrainingBatches(
    train, objective, users_per_batch=12, fraction=1.0, max_sequences=1, until=cut, epochs=6
)
model = Towers()
optimizer = torch.optim.Adam(model.parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, len(batches))
sketch = recblocks.CountMinSketch.from_error(epsilon=1e-4, delta=0.01)
losses = []
for step in range(len(batches)):
    examples = batches[step]
    bought = train.columns["item"][examples.pair_label]
    who = examples.users[examples.pair_row]
    pool = recblocks.mixed_negative_pool(len(bought), num_items, num_random=256)
    columns = torch.cat([bought[pool.in_batch], pool.random])
    sketch.update(bought)
    log_q = functools.partial(
        recblocks.mixed_log_q,
        total=sketch.total,
        num_in_batch=pool.num_in_batch,
        num_random=pool.num_random,
        num_candidates=num_items,
    )
    slots = model.embed_users(train.gather(examples.actions), examples.valid)
    loss = recblocks.sampled_softmax_loss(
        slots[examples.pair_row, examples.pair_slot],
        model.item(content[bought]),
        model.item(content[columns]),
        log_q_positives=log_q(sketch.query(bought)),
        log_q_negatives=log_q(sketch.query(columns)),
        own=(who, columns, who, bought),
        temperature=model.temperature(),
        weights=recblocks.equal_user_weights(who) * examples.pair_weight,
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    losses.append(loss.item())

# %%
# Users that were in no training batch, embedded as of the cut, and what they engage with in the two weeks after it.

model.eval()
past, future = recblocks.split_by_time(judged, cut)
user, index = future.actions()
kept = recblocks.positive_engagement(future.gather(index))
positives = recblocks.unique_pairs((user[kept], future.columns["item"][index[kept]]))

newest = past.starts[:, None] + torch.arange(max_len)
valid = newest < past.ends[:, None]
with torch.no_grad():
    users = model.embed_users(past.gather(torch.where(valid, newest, 0)), valid)[:, 0]
    items = model.item(content)

# %%
# Recall@10: the share of what a user engages with that is among the ten items nearest to the embedding; and the same
# of the most popular items, which are the same for everybody.

sold = torch.bincount(train.columns["item"][train.columns["time"] <= cut], minlength=num_items).float()
recall = {
    "PinnerFormer": recblocks.recall_at_k(users, items, positives, k=10),
    "mean of the user's items": recblocks.recall_at_k(
        (content[past.gather(torch.where(valid, newest, 0))["item"]] * valid[..., None]).sum(1),
        content,
        positives,
        k=10,
        metric="inner_product",
    ),
    "most popular items": recblocks.recall_at_k(
        torch.ones(len(past), 1), sold[:, None], positives, k=10, metric="inner_product"
    ),
}
print({name: round(float(value), 4) for name, value in recall.items()})

figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3), layout="constrained", width_ratios=[3, 2])
left.plot(torch.tensor(losses).unfold(0, 20, 20).mean(1))
left.set(xlabel="20 steps", ylabel="loss")
right.barh(list(recall), [float(value) for value in recall.values()])
right.invert_yaxis()
right.set_xlabel("Recall@10")
assert max(recall, key=recall.get) == "PinnerFormer"
