"""The subcommands of ``weightsync`` that speak to running agents, and ``doctor``."""
