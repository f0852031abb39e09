"""From data files to prompts: readers (`datasets`), templates, and the seeded, resumable order (`prompt_source`)."""
