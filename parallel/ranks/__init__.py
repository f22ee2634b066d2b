"""Ranks and how they talk: groups, the mesh, transports, collectives and their autograd pairs, the rendezvous.
No layer and no kernel lives here; what starts the processes is cluster/actors.
"""
