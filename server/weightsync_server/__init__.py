"""The inference node: agent, engines, receiver."""
