"""Prompts, texts and conversations, and the one reader of the files that a user hands over."""
