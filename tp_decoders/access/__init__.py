"""What a client needs to reach a server, as values: addresses, whom to trust, tokens, files that must stay private,
proxies. The server reads its own secrets by the same rules. Imports neither grpc nor the rest of this project.
"""
