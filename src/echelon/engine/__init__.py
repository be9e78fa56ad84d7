"""Many callers at once: admission, fair steps, supervised workers, an answer for everyone."""
