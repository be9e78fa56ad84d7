"""Batches to scores: the only folder that knows torch."""
