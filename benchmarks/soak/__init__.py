"""Long jobs against a short lease, for long: nothing comes twice, and nothing grows."""
