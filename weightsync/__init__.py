"""weightsync: new weights for live inference engines, over RDMA, whole or not at all."""

__version__ = "0.1.0"
