"""How many images go through a network together where nobody says."""

from .network import Network

BATCH_SIZE = 4


def usual_batch_size(network: Network) -> int | None:
    """As many as are a gain on a processor, or as the network takes; None for one that takes one number only."""
    return min(BATCH_SIZE, network.largest_batch or BATCH_SIZE) if network.batch is None else None


__all__ = ["BATCH_SIZE", "usual_batch_size"]
