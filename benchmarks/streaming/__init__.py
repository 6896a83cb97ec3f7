"""What streams cost, one at a time and many at once."""
