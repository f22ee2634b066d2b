"""What a server's own death must not lose: the durable log of calls and answers, its records, files and writer.
Open requests in memory are fleet/open_requests', replay is fleet/replay's. Why not SQLite: bench/RESULTS.md.
"""
