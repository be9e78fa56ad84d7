"""Services and fleets on a virtual clock. Pure and deterministic: no torch, no wall clock.

`echelon plan`: profile and goal in, machines out.
"""
