"""Whether a machine and a run are in order: what `diffrc doctor` and `diffrc status` say."""
