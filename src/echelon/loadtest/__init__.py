"""A load test of any reranking server: what it takes, how long it takes, and when it breaks."""
