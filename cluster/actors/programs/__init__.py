"""What a rank runs, and the values it is made of: serving, training, the preflight.
The shell around it is group/worker; no Ray is imported here.
"""
