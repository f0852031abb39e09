"""Process sources: where rewards for the way to an answer come from. One module per kind."""
