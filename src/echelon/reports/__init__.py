"""Reports out of profiles: one again, or two side by side."""
