"""The daemon beside the engine: HTTP for trainers outside, for its engine over loopback."""
