"""rlprm: reinforcement learning of language models with process rewards."""

__version__ = "0.1.0"
