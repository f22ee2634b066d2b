"""The protocol's messages over the client library's connection, for tests and benchmarks. The library itself, which the
command line uses, is tp_decoders.client.
"""

from cluster.rpc.client.client import AsyncClient, Client, ServiceError

__all__ = ["AsyncClient", "Client", "ServiceError"]
