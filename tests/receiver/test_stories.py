"""What others lived through with a worker's memory and its completion flags, and can't be here."""

from __future__ import annotations

import pytest
import torch

from tests.receiver.mixed import serves, weights
from tests.receiver.toys import ToyAdapter, new_pair
from weightsync.errors import DeadlineError


def test_story_a_completion_marker_in_the_data_buffer(engine: ToyAdapter) -> None:
    """Elsewhere the marker was written into the buffer's end and became part of an embedding."""
    receiver, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    marker = b"ws:1:1:0"
    given = weights(1)
    # weights whose very bytes look like the message that completes this push
    marked = torch.frombuffer(bytearray(marker), dtype=torch.bfloat16)
    given["embed.weight"].view(-1)[: marked.numel()] = marked
    given["norm.weight"].view(torch.uint8).view(-1)[-len(marker) :] = torch.frombuffer(
        bytearray(marker), dtype=torch.uint8
    )
    digests = trainer.fill(given)
    trainer.begin(1)
    trainer.transport.post(trainer.write, b"part")  # all bytes are there, the message is not
    trainer.transport.wait([trainer.write], timeout_s=5)
    with pytest.raises(DeadlineError, match="did not report version 1"):
        trainer.commit(1, digests, timeout_s=0.05)
    assert receiver.dirty
    trainer.rendezvous(weights())
    trainer.push(given, 2)
    assert serves(engine, given), "the message is not among the weights"


def test_story_a_flag_zeroed_after_the_remote_write(engine: ToyAdapter) -> None:
    """Elsewhere a receiver cleared its flag when the next write had already set it: it hung."""
    receiver, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    for version in range(1, 6):
        digests = trainer.fill(weights(version))
        trainer.begin(version)
        trainer.send(version)
        trainer.commit(version, digests)
        # the next push's message is there before this one's commit is even answered again
        digests_next = trainer.fill(weights(version + 10))
        trainer.send(version + 100)
        assert trainer.commit(version, digests).version == version
        assert digests_next != digests
    digests = trainer.fill(weights(9))
    trainer.begin(200)
    with pytest.raises(DeadlineError, match="did not report version 200"):
        trainer.commit(200, digests, timeout_s=0.05)  # nor does an older message count for it
    trainer.send(200)
    trainer.commit(200, digests)
    assert (receiver.version, receiver.dirty) == (200, False)
    assert serves(engine, weights(9))
