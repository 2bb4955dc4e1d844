"""Building blocks for recommender models; each works alone."""

from recblocks.features.time import (
    PINNERFORMER_PERIODS,
    LogPeriodicTimeEncoder,
    gap_to_next_older,
    log_periodic_features,
    log_spaced_periods,
    time_since_latest,
)
from recblocks.timelines.storage import TimelinesWriter
from recblocks.timelines.timeline import Timelines, write_timelines

__version__ = "0.1.0.dev0"

__all__ = [
    "PINNERFORMER_PERIODS",
    "LogPeriodicTimeEncoder",
    "Timelines",
    "TimelinesWriter",
    "gap_to_next_older",
    "log_periodic_features",
    "log_spaced_periods",
    "time_since_latest",
    "write_timelines",
]
