"""Embedded tasks: problems whose reasoning steps can be checked exactly, so process credit can be measured."""
