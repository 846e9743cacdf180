"""Distils, scores and reports; every job is a module launched by name."""
