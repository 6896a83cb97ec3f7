"""The other side: publish requests, read responses, join them. Knows adapters and schemas, never the worker."""
