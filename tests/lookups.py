"""Tables and features of two widths, pooled in every way: what the lookups for serving and of Triton are tried on."""

from recblocks import EmbeddingTable, IdFeature

TABLES = {"items": EmbeddingTable(40, dim=4), "users": EmbeddingTable(20, dim=3)}
FEATURES = {
    "user": IdFeature("users", num_unseen=2),
    "item": IdFeature("items"),
    "liked": IdFeature("items", pooling="mean"),
    "tags": IdFeature("items", pooling="sum"),
    "seen": IdFeature("items", pooling=None),
}
