"""Packed layers beside every dense engine that a user could pick, timed in turns in one process."""
