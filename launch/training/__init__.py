"""What `train` does after its settings are read: the run on Ray, its progress and metrics.
Settings are read in commands/train; the ranks' part is cluster/actors/programs.
"""
