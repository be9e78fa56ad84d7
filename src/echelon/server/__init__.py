"""The HTTP server: the APIs that reranking clients already use, with metrics, logs and pages."""
