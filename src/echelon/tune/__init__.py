"""Finding the best settings: measure the machine, choose, remember."""
