"""vLLM's plugin entry point ``vllm.general_plugins``: it names the backend, and loads nothing.

vLLM calls :func:`register` in each of its processes, wherever weightsync is installed, whether or
not anybody uses it: so it imports what vLLM has loaded anyway, and no failure of it leaves here.
"""

from __future__ import annotations

import logging

#: ``weight_transfer_config={"backend": BACKEND}``
BACKEND = "weightsync"

log = logging.getLogger(__name__)


def register() -> None:
    """Enter both halves of the backend into vLLM's factories.  May be called any number of times.

    vLLM below 0.28 has no factory for the trainer's half, and hands its workers' half too little:
    there nothing is registered.
    """
    try:
        from vllm.distributed.weight_transfer.factory import (
            WeightTransferEngineFactory,
            WeightTransferTrainerFactory,
        )
    except ImportError as error:
        log.debug("this vLLM takes no weightsync backend: %s", error)
        return
    halves = (
        (WeightTransferEngineFactory, "weightsync_server.integrations.vllm_backend", "Worker"),
        (WeightTransferTrainerFactory, "weightsync_client.integrations.vllm", "Trainer"),
    )
    for factory, module, half in halves:
        try:
            factory.register_engine(BACKEND, module, f"Weightsync{half}Engine")
        except ValueError:
            log.debug("vLLM has a %s backend in %s already", BACKEND, factory.__name__)
        except Exception:
            log.warning("vLLM did not take the %s backend", BACKEND, exc_info=True)
