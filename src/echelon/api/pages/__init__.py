"""The pages for people: playground and dashboard, with no build step and no other server."""
