"""What `train` does after its settings are read: the door that checks them, the run on Ray, its progress and metrics.
Settings are read in commands/train; the ranks' part is cluster/actors/programs.
"""
