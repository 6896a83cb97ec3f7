"""The user's own functions as an engine: no opinion on what a request's body is. They import `worker/functions.py`."""
