"""The receiver: what runs inside of an engine's worker."""
