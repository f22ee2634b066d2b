"""What a server's own death must not lose: the durable log of calls and answers, its records, files and writer.
Open requests in memory are fleet/open_requests'; calls are taken up again by fleet/replay.
Why files of its own and not SQLite: bench/RESULTS.md.
"""
