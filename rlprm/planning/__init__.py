"""What a configuration needs, worked out before anything starts."""
