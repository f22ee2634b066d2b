"""Ray clusters: files for `ray up` and Kubernetes, node scripts, and the surroundings of one that a command starts
itself. Joining a cluster and placing ranks is cluster/actors'.
"""
