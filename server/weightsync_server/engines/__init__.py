"""What the receiver needs to know about each engine."""
