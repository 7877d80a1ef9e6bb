"""weightsync: new weights for live inference engines, over RDMA, whole or not at all."""

__version__ = "0.1.0"
#: versions of vLLM that the receiver is tested with, by major and minor
TESTED_VLLM = ("0.24", "0.32")
