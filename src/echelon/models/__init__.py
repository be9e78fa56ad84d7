"""Token ids → logits: the only package of the core that imports torch and onnxruntime.

It also turns a model's name into a folder: a local one, the demo model, or a hub repository.
"""
