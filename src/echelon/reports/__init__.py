"""Reports of profiles: one profile, or two side by side."""
