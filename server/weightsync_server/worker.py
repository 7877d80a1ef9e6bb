"""vLLM's side door: ``--worker-extension-cls weightsync_server.worker.WeightsyncWorker``."""

from __future__ import annotations

from weightsync_server.engines.vllm import VllmAdapter, plain_cpu_weights, wants_plain
from weightsync_server.receiver.endpoint import WorkerEndpoint

if wants_plain():
    # vLLM imports this class before the worker loads its model: the last moment to say so
    plain_cpu_weights()


class WeightsyncWorker:
    """Mixed into every vLLM worker; ``collective_rpc("weightsync_call", ...)`` reaches it."""

    def weightsync_call(self, command: str) -> None:
        """Run one command of the agent; the reply goes to the agent by HTTP."""
        endpoint = self.__dict__.get("_weightsync_endpoint")
        if endpoint is None:
            endpoint = self.__dict__["_weightsync_endpoint"] = WorkerEndpoint(VllmAdapter(self))
        endpoint.call(command)
