"""verl starts vLLM with a worker extension of its own, and vLLM takes one: here are both.

``rollout.engine_kwargs.vllm.worker_extension_cls:
weightsync_server.integrations.verl_worker.WeightsyncVerlWorker``
"""

from __future__ import annotations

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from weightsync_server.worker import WeightsyncWorker


class WeightsyncVerlWorker(WeightsyncWorker, vLLMColocateWorkerExtension):
    """verl's worker extension with weightsync's receiver beside it."""
