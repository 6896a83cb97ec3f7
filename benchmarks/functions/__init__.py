"""What the user's own functions cost through rejoinder, and what batches bring them."""
