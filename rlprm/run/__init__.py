"""Putting a run together and keeping it alive: build, checkpoint, tracker, clock, progress."""
