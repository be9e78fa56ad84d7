"""Batches to scores: the only folder that knows torch.

Model name → local folder: the demo model, a folder on disk, or a repository on the hub.

What lives here must not know what a model is used for: no torch, no tokenizing, no judging of a
checkpoint's contents. Libraries that talk to the network are imported where they are called.
"""
