"""
What logQ does to popular items
===============================

Two towers learn from purchases of which a few items have most. In-batch negatives are drawn by popularity, so without
a correction a popular item is punished as often as it is sold, and rare items are retrieved instead. Seeds 0 (data) and
1 (training); the data is invented here.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import recblocks

num_users, num_items, dim, batch, groups = 1000, 2000, 16, 512, 20

torch.manual_seed(0)
popularity = 1 / torch.arange(1, num_items + 1).float()
users = torch.randint(num_users, (60_000,))
items = torch.multinomial(popularity, 60_000, replacement=True)
# Users of a group buy that group's items: of the same popularity, more or less.
items = (items // groups * groups + users % groups).clamp(max=num_items - 1)
sold = torch.bincount(items, minlength=num_items)

# %%
# The same towers, pool and steps; only the correction differs.


def train(corrected):
    torch.manual_seed(1)
    user_tower, item_tower = nn.Embedding(num_users, dim), nn.Embedding(num_items, dim)
    optimizer = torch.optim.Adam([*user_tower.parameters(), *item_tower.parameters()], lr=0.02)
    sketch = recblocks.CountMinSketch.from_error(epsilon=1e-4, delta=0.01)
    for _ in range(400):
        rows = torch.randint(len(users), (batch,))
        who, bought = users[rows], items[rows]
        sketch.update(bought)
        log_q = recblocks.mixed_log_q(
            sketch.query(bought), sketch.total, num_in_batch=batch, num_random=0, num_candidates=num_items
        )
        queries = nn.functional.normalize(user_tower(who), dim=1)
        columns = nn.functional.normalize(item_tower(bought), dim=1)
        loss = recblocks.sampled_softmax_loss(
            queries,
            columns,
            columns,
            log_q_positives=log_q if corrected else None,
            log_q_negatives=log_q if corrected else None,
            own=(who, bought, who, bought),
            temperature=0.1,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return nn.functional.normalize(user_tower.weight.detach(), dim=1), nn.functional.normalize(
        item_tower.weight.detach(), dim=1
    )


# %%
# Which items the ten nearest of every user are, by how often they are sold.

shares = {}
tenth = sold.argsort(descending=True).argsort() * 10 // num_items  # 0: the tenth of the items that is sold most
for name, corrected in {"with logQ": True, "without": False}.items():
    found = recblocks.retrieve(*train(corrected), k=10)
    shares[name] = torch.bincount(tenth[found.items].flatten(), minlength=10) / found.items.numel()
shares["sold"] = torch.bincount(tenth[items], minlength=10) / len(items)

figure, axes = plt.subplots(figsize=(7.2, 3), layout="constrained")
for place, (name, share) in enumerate(shares.items()):
    axes.bar([at + 0.27 * (place - 1) for at in range(10)], share.tolist(), width=0.25, label=name)
axes.set_xlabel("tenth of the items, most sold first")
axes.set_ylabel("share of all lists")
axes.set_xticks(range(10), range(1, 11))
axes.legend(frameon=False)
assert shares["with logQ"][0] > 2 * shares["without"][0]
