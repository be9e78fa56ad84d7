"""Echelon on many machines through Ray, the only package that imports it."""
