"""Actions become per-user timelines, timelines training examples."""
