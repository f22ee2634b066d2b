"""Ray: placement, worker shells, supervision. The only place that imports ray."""
