"""The command line: thin commands over worker and client."""
