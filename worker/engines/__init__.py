"""What runs a request: the echo engine, and models in processes of their own."""
