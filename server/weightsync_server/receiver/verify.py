"""Does the engine serve what a rendezvous would write?  Nothing that it serves with is changed."""

from __future__ import annotations

from weightsync.errors import LayoutError, VerifyError
from weightsync.worker_messages import RankDigestsBody
from weightsync_server.receiver.epoch import ALL, Epoch
from weightsync_server.receiver.proof import Prover


def differences(epoch: Epoch, prover: Prover, sent: list[RankDigestsBody]) -> dict[str, str]:
    """What is other in each kernel tensor than a push of this epoch would leave there.

    What is written directly or through a shadow is compared by digests of what serves.  What is
    staged has been written to its buffer, which is post-processed and compared as in a proof, and
    so is what was made beside a direct tensor.

    Raises:
        VerifyError: A buffer holds other bytes than were sent: nothing can be said.
    """
    target = epoch.target
    regions = target.layout.regions
    other: dict[str, str] = {}
    for rank, writes in epoch.mismatches(sent, ALL, shadow=False).items():
        for region, offset, nbytes in writes:
            name = regions[region].name
            if name in target.staged:
                raise VerifyError(
                    f"{nbytes} bytes at {offset} of the buffer for {name} are not those that rank "
                    f"{rank} sent",
                    hint="write what is staged before POST /verify, and verify again",
                    tensor=name,
                )
            other[name] = "other bytes"
    for unit in epoch.proofs.units:
        names = unit.params.values()
        if unit.kind == "direct" or other.keys() & names:
            continue
        try:
            given = {name: target.memory[name].to(prover.adapter.device) for name in names}
            what = prover.difference(unit, given, "copy", full=True)
        except LayoutError as error:
            what = error.message
        if what:
            other.update(dict.fromkeys(names, what))
    return other
