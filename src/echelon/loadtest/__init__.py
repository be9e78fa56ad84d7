"""Load tests of any reranking server: `echelon stress`."""
