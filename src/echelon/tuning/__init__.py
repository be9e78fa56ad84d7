"""Measures a model on this machine, chooses settings and validates them under load."""
