"""Files of any size: rerank them, resume after a stop, compare with judgements (docs/BATCH.md)."""
