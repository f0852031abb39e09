"""Held-out accuracy: greedy, mean@N and pass@k."""
