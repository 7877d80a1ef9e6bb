"""``weightsync bench``: pushes measured beside their baselines, in the same run."""
