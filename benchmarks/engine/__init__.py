"""Tokens per second of the whole worker, over bare `generate_batch` on the same prompts, model and sizes."""
