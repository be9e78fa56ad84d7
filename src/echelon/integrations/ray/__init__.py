"""Many machines, through Ray: the only folder that knows it."""
