"""The user's own functions as an engine."""
