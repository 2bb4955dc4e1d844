"""Building blocks for recommender models; each works alone."""

from typing import TYPE_CHECKING

from recblocks.embedding._layout import EmbeddingTable, IdFeature, Vectors
from recblocks.embedding._packing import PackedIds
from recblocks.embedding.fused_lookup import FusedEmbeddingLookup
from recblocks.embedding.id_table import IdTable, Inserted, TableFull
from recblocks.embedding.serving_lookup import ServingLookup, quantize_rows
from recblocks.embedding.shardable_lookup import ShardableLookup
from recblocks.embedding.torchrec import KeyedLookup, copy_to_collections, lookup_from_collections
from recblocks.evaluation._chunks import UserMeans
from recblocks.evaluation._pairs import unique_pairs
from recblocks.evaluation.auc import auc, auc_bootstrap, chunk_auc, chunk_auc_per_user, paired_auc_bootstrap
from recblocks.evaluation.calibration import Calibration, calibration
from recblocks.evaluation.diversity import coverage_at_k, interest_entropy_at_k
from recblocks.evaluation.index import ItemIndex
from recblocks.evaluation.per_user import (
    PerUser,
    hit_rate_per_user,
    ndcg_per_user,
    recall_per_user,
    reciprocal_rank_per_user,
)
from recblocks.evaluation.protocols import (
    EmbeddingPoints,
    JudgedPositives,
    embedding_points,
    in_window,
    protocol_ranks,
    reference_times,
)
from recblocks.evaluation.ranking import blend_scores, distinct_in_top_k, distinct_per_user, hit_at_k, hit_per_user
from recblocks.evaluation.retrieval import TopK, positive_ranks, recall_at_k, retrieval_ranks, retrieve, top_k
from recblocks.evaluation.several_embeddings import closest_embedding, round_robin
from recblocks.evaluation.statistics import Interval, bootstrap_mean, paired_bootstrap
from recblocks.features.action import ActionEncoder, KeptActions, drop_out_of_vocabulary
from recblocks.features.item import ItemEncoder
from recblocks.features.time import (
    PINNERFORMER_PERIODS,
    LogPeriodicTimeEncoder,
    gap_to_next_older,
    log_periodic_features,
    log_spaced_periods,
    time_since_latest,
)
from recblocks.interaction.cross_network import CrossNetwork
from recblocks.kernels.own_positives import own_positive_mask
from recblocks.losses.dense_all_action import dense_all_action_loss, positives_in_window
from recblocks.losses.label_weighted_bce import (
    attribute_weights,
    label_weight_matrix,
    label_weighted_bce_with_logits,
)
from recblocks.losses.sampled_softmax import sampled_softmax_loss
from recblocks.losses.temperature import LearnedTemperature
from recblocks.losses.weights import equal_user_weights, rank_weights
from recblocks.negatives.gather import gather_rows
from recblocks.negatives.log_q import mixed_log_q
from recblocks.negatives.pool import NegativePool, mixed_negative_pool
from recblocks.sequence.action_transformer import ActionTransformer, EncodedUser
from recblocks.sequence.aggregators import (
    AveragePooling,
    CNNAggregator,
    LSTMAggregator,
    RNNAggregator,
    average_pool,
)
from recblocks.sequence.causal_encoder import CausalSequenceEncoder
from recblocks.sequence.compression import OutputCompression, compress_output
from recblocks.sequence.fusion import fuse_append, fuse_concat
from recblocks.sequence.masks import RandomTimeWindowMask, random_time_window_mask
from recblocks.sketch import CountMinSketch
from recblocks.timelines.cleaning import CleanedActions, CleaningReport, clean_actions
from recblocks.timelines.convert import from_newest_first, to_newest_first
from recblocks.timelines.examples import Anchors, Examples, drop_rows_without_pairs, sample_anchors
from recblocks.timelines.kuairand import KUAIRAND_TYPES, Impressions, kuairand27k_explicit, kuairand_pure
from recblocks.timelines.loader import TrainingBatches
from recblocks.timelines.micro_batches import NewestActions, RealtimeActions
from recblocks.timelines.objectives import all_action, dense_all_action, dense_all_positives, next_action, sasrec
from recblocks.timelines.promotions import Promotions, completejourney_promotions
from recblocks.timelines.simulator import Simulation, positive_engagement, simulate
from recblocks.timelines.sources import Source, amazon_beauty, completejourney, movielens_1m
from recblocks.timelines.splits import split_by_time, split_by_user, user_shares
from recblocks.timelines.storage import TimelinesWriter
from recblocks.timelines.tables import columns_from_arrow
from recblocks.timelines.timeline import Timelines, write_timelines
from recblocks.timelines.worlds import INDIFFERENT, INTERESTS, MARKOV, RESPONSIVE, UNIFORM, World

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """The version of the installed package, looked up when it is asked for: a source tree alone has none."""
        if name != "__version__":
            raise AttributeError(f"module 'recblocks' has no attribute {name!r}")
        from importlib.metadata import version

        return version("recblocks")


__all__ = [
    "INDIFFERENT",
    "INTERESTS",
    "KUAIRAND_TYPES",
    "MARKOV",
    "PINNERFORMER_PERIODS",
    "RESPONSIVE",
    "UNIFORM",
    "ActionEncoder",
    "ActionTransformer",
    "Anchors",
    "AveragePooling",
    "CNNAggregator",
    "Calibration",
    "CausalSequenceEncoder",
    "CleanedActions",
    "CleaningReport",
    "CountMinSketch",
    "CrossNetwork",
    "EmbeddingPoints",
    "EmbeddingTable",
    "EncodedUser",
    "Examples",
    "FusedEmbeddingLookup",
    "IdFeature",
    "IdTable",
    "Impressions",
    "Inserted",
    "Interval",
    "ItemEncoder",
    "ItemIndex",
    "JudgedPositives",
    "KeptActions",
    "KeyedLookup",
    "LSTMAggregator",
    "LearnedTemperature",
    "LogPeriodicTimeEncoder",
    "NegativePool",
    "NewestActions",
    "OutputCompression",
    "PackedIds",
    "PerUser",
    "Promotions",
    "RNNAggregator",
    "RandomTimeWindowMask",
    "RealtimeActions",
    "ServingLookup",
    "ShardableLookup",
    "Simulation",
    "Source",
    "TableFull",
    "Timelines",
    "TimelinesWriter",
    "TopK",
    "TrainingBatches",
    "UserMeans",
    "Vectors",
    "World",
    "all_action",
    "amazon_beauty",
    "attribute_weights",
    "auc",
    "auc_bootstrap",
    "average_pool",
    "blend_scores",
    "bootstrap_mean",
    "calibration",
    "chunk_auc",
    "chunk_auc_per_user",
    "clean_actions",
    "closest_embedding",
    "columns_from_arrow",
    "completejourney",
    "completejourney_promotions",
    "compress_output",
    "copy_to_collections",
    "coverage_at_k",
    "dense_all_action",
    "dense_all_action_loss",
    "dense_all_positives",
    "distinct_in_top_k",
    "distinct_per_user",
    "drop_out_of_vocabulary",
    "drop_rows_without_pairs",
    "embedding_points",
    "equal_user_weights",
    "from_newest_first",
    "fuse_append",
    "fuse_concat",
    "gap_to_next_older",
    "gather_rows",
    "hit_at_k",
    "hit_per_user",
    "hit_rate_per_user",
    "in_window",
    "interest_entropy_at_k",
    "kuairand27k_explicit",
    "kuairand_pure",
    "label_weight_matrix",
    "label_weighted_bce_with_logits",
    "log_periodic_features",
    "log_spaced_periods",
    "lookup_from_collections",
    "mixed_log_q",
    "mixed_negative_pool",
    "movielens_1m",
    "ndcg_per_user",
    "next_action",
    "own_positive_mask",
    "paired_auc_bootstrap",
    "paired_bootstrap",
    "positive_engagement",
    "positive_ranks",
    "positives_in_window",
    "protocol_ranks",
    "quantize_rows",
    "random_time_window_mask",
    "rank_weights",
    "recall_at_k",
    "recall_per_user",
    "reciprocal_rank_per_user",
    "reference_times",
    "retrieval_ranks",
    "retrieve",
    "round_robin",
    "sample_anchors",
    "sampled_softmax_loss",
    "sasrec",
    "simulate",
    "split_by_time",
    "split_by_user",
    "time_since_latest",
    "to_newest_first",
    "top_k",
    "unique_pairs",
    "user_shares",
    "write_timelines",
]
