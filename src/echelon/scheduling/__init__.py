"""Tokens to batches. Pure and deterministic: no clock, no threads, no torch."""
