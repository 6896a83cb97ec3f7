"""The work: receive, run, reply, settle."""
