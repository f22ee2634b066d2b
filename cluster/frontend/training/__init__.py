"""Training calls at the front-end: fields, labels, who waits for an answer, which weights are served.
What the ranks do is cluster/training's.
"""
