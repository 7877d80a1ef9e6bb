"""What is wrong with a machine, before a push finds out: see ``weightsync doctor``."""
