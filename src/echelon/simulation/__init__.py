"""Simulated servers and clusters on a virtual clock, and `echelon plan`. Pure, no wall clock."""
