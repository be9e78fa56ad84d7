"""Finding the best settings: measure the machine, choose, remember.

``echelon tune --scenario``: predict, choose, prove, and say how far the two were apart.
"""
