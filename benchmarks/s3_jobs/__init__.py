"""What a job of JSON lines costs in memory and time."""
