"""Echelon as a component of other frameworks, each in its own module and behind its own extra.

    from echelon.adapters.langchain import EchelonReranker    # echelon-rerank[langchain]
    from echelon.adapters.llamaindex import EchelonRerank     # echelon-rerank[llamaindex]
    from echelon.adapters.haystack import EchelonRanker       # echelon-rerank[haystack]

Each takes a model's name with the options of :class:`echelon.Reranker`, or one that is open already
and may be shared, and gives back its order and its scores.
"""
