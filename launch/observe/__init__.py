"""How processes are watched: logs, Prometheus metrics and their port, traces, flight records of a fault.
What is counted is counted in cluster/.
"""
