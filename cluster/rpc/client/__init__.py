"""A small client: messages from plain values, retries, errors, hints on what stands in the way.
The command line's use of it is launch/client.
"""

from cluster.rpc.client.client import AsyncClient, Client, ServiceError

__all__ = ["AsyncClient", "Client", "ServiceError"]
