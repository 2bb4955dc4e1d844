"""
A ranker that sees the latest actions
=====================================

Whoever saved something ten minutes ago wants more of the same, and has hidden what is like an item hidden just now. A
ranker on dense features and the candidate alone cannot know; with an `ActionTransformer` beside the candidate it
does. Seeds 0 (data) and 1 (training); the data is invented here.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import recblocks

torch.manual_seed(0)
num_items, item_dim, slots, batch = 500, 8, 12, 256
heads = ["save", "hide"]
SAVED, HIDDEN = 0, 1
items = nn.functional.normalize(torch.randn(num_items, item_dim), dim=1)


def draw(number):
    """Requests: what the user did before, the candidate, and what the user does with it."""
    actions = torch.randint(num_items, (number, slots))
    kind = torch.randint(2, (number, slots))
    valid = torch.arange(slots) < torch.randint(1, slots + 1, (number, 1))
    candidate = torch.randint(num_items, (number,))
    likeness = torch.einsum("bsd,bd->bs", items[actions], items[candidate]).masked_fill(~valid, 0)
    liked = (likeness * (kind == SAVED)).amax(1)
    disliked = (likeness * (kind == HIDDEN)).amax(1)
    labels = torch.stack([torch.rand(number) < liked.clamp(0, 1), torch.rand(number) < disliked.clamp(0, 1)], dim=1)
    return {"item": items[actions], "kind": kind, "valid": valid, "candidate": items[candidate]}, labels


# %%
# Two rankers that differ in one input.


class Ranker(nn.Module):
    def __init__(self, with_actions):
        super().__init__()
        self.actions = (
            recblocks.ActionTransformer(item_dim=item_dim, num_action_types=2, type_dim=8) if with_actions else None
        )
        self.compression = recblocks.OutputCompression(4)
        extra = self.compression.out_columns * self.actions.out_dim if with_actions else 0
        self.heads = nn.Sequential(nn.Linear(item_dim + extra, 64), nn.ReLU(), nn.Linear(64, len(heads)))

    def forward(self, item, kind, valid, candidate):
        inputs = [candidate]
        if self.actions is not None:
            inputs.append(self.compression(*self.actions(item, kind, candidate, valid=valid)))
        return self.heads(torch.cat(inputs, dim=1))


matrix = recblocks.label_weight_matrix({"save": {"save": 1, "hide": 1}, "hide": {"save": 1, "hide": 1}}, heads)
base = torch.ones(2)
judged, truth = draw(4000)


def train(with_actions):
    torch.manual_seed(1)
    model = Ranker(with_actions)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    curve = []
    for step in range(201):
        if step % 50 == 0:
            model.eval()
            with torch.no_grad():
                scores = model(**judged)
            curve.append([recblocks.auc(scores[:, head], truth[:, head]).item() for head in range(2)])
            model.train()
        features, labels = draw(batch)
        loss = recblocks.label_weighted_bce_with_logits(model(**features), labels, matrix, base_weights=base)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.tensor(curve)


# %%
# AUC of each head on requests that were not trained on.

figure, axes = plt.subplots(1, 2, figsize=(7.2, 3), layout="constrained", sharey=True)
curves = {"with actions": train(True), "candidate alone": train(False)}
for head, axis in enumerate(axes):
    for name, curve in curves.items():
        axis.plot(range(0, 201, 50), curve[:, head], marker="o", label=name)
    axis.set_title(heads[head])
    axis.set_xlabel("step")
axes[0].set_ylabel("AUC")
axes[0].legend(frameon=False)
assert (curves["with actions"][-1] > curves["candidate alone"][-1] + 0.05).all()
