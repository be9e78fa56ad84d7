"""One file for each API shape, and the table of paths."""
