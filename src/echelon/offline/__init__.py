"""Files: offline reranking that goes on where it was; see docs/BATCH.md."""
