"""Building blocks for recommender models; each works alone."""

__version__ = "0.1.0.dev0"
