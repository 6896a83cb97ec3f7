"""The JSON of the contract: envelope, OpenAI bodies, errors. No I/O."""
