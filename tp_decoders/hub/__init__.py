"""Models of the Hugging Face hub by name: which commit, which files, what lies in the hub's cache, what went wrong.
Reads no tensor and no setting of a model.
"""
