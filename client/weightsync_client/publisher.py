"""``Publisher.push(model)``: the whole life of most trainers."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist

from weightsync.closing import Closing
from weightsync.errors import InputError, NoSessionError, PushInProgressError, StaleEpochError
from weightsync.lending import LEND_NBYTES
from weightsync.plan import COALESCE_NBYTES
from weightsync.protocol import PauseMode, PushMode
from weightsync.slab import ALIGN_NBYTES
from weightsync.topology import cuda_address
from weightsync.transport.base import Transport
from weightsync_client.bearer import Token
from weightsync_client.catch_up import CatchUp
from weightsync_client.control import Fleet
from weightsync_client.gloo import make_ranks
from weightsync_client.health import check
from weightsync_client.membership import Agents, members_of, server_name_of
from weightsync_client.opened import Open, PushSettings
from weightsync_client.policy import Policy, check_policy
from weightsync_client.progress import Progress, ProgressKind, make_progress
from weightsync_client.push import Push
from weightsync_client.pushed import Pushed
from weightsync_client.quantization import QuantizationSpec
from weightsync_client.report import AgentOutcome, PushReport, WarmupReport
from weightsync_client.settings import Deadlines, token_from_env
from weightsync_client.source import Conversion, Weights, as_spec
from weightsync_client.structure import Structures
from weightsync_client.tls import Cert, Verify, tls_context
from weightsync_client.warmup import Warmup

_DAY_S = 86_400.0


class Publisher(Closing):
    """Pushes a model's weights into every engine of a fleet, whole or not at all.

    It connects at the first push.  A context manager; one that is not closed is closed at exit.
    One thread pushes at a time.

    In a distributed job every rank makes one, with the same arguments, and every rank calls
    :meth:`push` with what it has; the bytes go from each rank straight to the engines, and rank 0
    alone speaks to the agents.  Where one rank fails, all ranks raise the same error.

    Args:
        agents: ``http://host:port`` of each agent; or what is looked up anew for each push:
            ``file:PATH`` or a Path (an address a line, ``#`` comments), ``dns:HOST:PORT`` (every
            address of the name), or a function that returns the addresses.  Rank 0's count.
        policy: ``all``: if one agent fails, the push fails, and no engine is left with half of it;
            ``available``: agents that fail are dropped, and the others get the version;
            :class:`weightsync_client.policy.Quorum`: the same, if so many are left at least.  The
            report names who was dropped; each takes part in the next push again.
        wait_for_agents_s: At first, wait so long for agents, and for their engines, that are not
            there yet.
        token: The agents' bearer token, or the Path of its file, which is read for every call;
            default: ``WEIGHTSYNC_TOKEN``, or the file that ``WEIGHTSYNC_TOKEN_FILE`` names.
        transport: ``nixl``; ``ucxx``, for which engines need ``WEIGHTSYNC_TRANSPORT=ucxx``; or
            what makes a :class:`weightsync.transport.base.Transport` with a name of its own, once
            an epoch; the device of the slots is the current one then.
        check_finite: Refuse weights that are NaN or infinite, before anything is sent.
        mode: ``direct``: the engines stand still while the weights are written.  ``shadow``: they
            are written to a second copy, and the engines stand still only while it takes the
            weights' place; an engine needs memory for the copy, and the version before can be put
            back (``weightsync rollback``).
        pause_mode: What happens to running requests: they are kept and go on afterwards
            (``keep``), are finished first (``wait``), or end (``abort``).
        reset_caches: The engines drop the prefix blocks and encoder outputs that they have
            computed, and compute those of kept requests anew.  False: they go on using them, with
            weights that they were not computed with.
        deadlines: Of every wait.
        progress: ``terminal``, ``log``, ``off``, ``auto`` (a terminal if stderr is one), or your
            own :class:`weightsync_client.progress.Progress`.
        ignore: Shell patterns of tensors that an engine may have no use for.
        max_slot_bytes: Bound, rounded up to whole pages, of the registered memory that this rank's
            bytes are packed in for the wire; None: what they take, which is this rank's part of
            the model.  Where they do not fit they go in rounds, one half of the memory being
            filled while the other is on the wire: a push then packs everything twice, and from
            the third round on an engine waits for the slower of packing and wire.
        coalesce_bytes: A tensor of at most so many bytes that is cut over several ranks is gathered
            on one of them, in one exchange before the fill, and written once; 0: every rank writes
            what it has.
        zero_copy_bytes: Weights of which at least so many bytes lie side by side, here and in an
            engine's memory, in the engine's dtype, are written from where they are: they take no
            slots and no copy.  0: all are copied; None: 1 MiB.  What is written so stays allocated
            until the next rendezvous, and is copied from then on if the trainer puts it elsewhere
            between two pushes.
        conversion: What the weights go through to be checkpoint tensors: a
            :class:`weightsync_client.conversion.ConversionSpec`, the name of one that is
            registered, None: nothing, or ``auto``: for a module what is registered for its class,
            or else what transformers would save, and nothing for what is no module.
        quantization: What to publish as fp8, for engines that serve such a checkpoint.
        verify: What ``https`` agents are checked with: the PEM file of their CA, a TLS context, or
            True: ``WEIGHTSYNC_CA_FILE``, and without it the CAs that the world trusts.
        cert: What agents with ``--tls-client-ca`` are shown: a PEM file with certificate and key,
            or a file for each; default: ``WEIGHTSYNC_CERT_FILE`` and ``WEIGHTSYNC_KEY_FILE``.
        group: The ranks that push together: the default process group if there is one, another
            group of any backend, or None: this process alone.

    Raises:
        InputError: An address, or anything else here, is wrong.
        RankFailedError: Not all ranks of the group made a Publisher.
    """

    def __init__(
        self,
        agents: Agents,
        *,
        policy: Policy = "all",
        wait_for_agents_s: float = 0.0,
        token: Token | None = None,
        transport: Literal["nixl", "ucxx"] | Callable[[], Transport] = "nixl",
        check_finite: bool = True,
        mode: PushMode = "direct",
        pause_mode: PauseMode = "keep",
        reset_caches: bool = True,
        deadlines: Deadlines | None = None,
        progress: ProgressKind | Progress = "auto",
        ignore: Sequence[str] = (),
        max_slot_bytes: int | None = None,
        coalesce_bytes: int = COALESCE_NBYTES,
        zero_copy_bytes: int | None = None,
        conversion: Conversion = "auto",
        quantization: QuantizationSpec | None = None,
        verify: Verify = True,
        cert: Cert | None = None,
        group: dist.ProcessGroup | Literal["default"] | None = "default",
    ) -> None:
        if transport not in {"nixl", "ucxx"} and not callable(transport):
            raise InputError(
                f"unknown transport {transport!r}",
                hint='"nixl", "ucxx", or a function that makes one',
            )
        if max_slot_bytes is not None and max_slot_bytes < ALIGN_NBYTES:
            raise InputError(
                f"max_slot_bytes is {max_slot_bytes}",
                hint=f"slots are whole pages: {ALIGN_NBYTES} or more, or None: no bound",
            )
        if coalesce_bytes < 0:
            raise InputError(f"coalesce_bytes is {coalesce_bytes}", hint="0 or more; 0: never")
        if zero_copy_bytes is not None and zero_copy_bytes < 0:
            raise InputError(f"zero_copy_bytes is {zero_copy_bytes}", hint="0 or more; 0: never")
        if not 0 <= wait_for_agents_s <= _DAY_S:
            raise InputError(
                f"wait_for_agents_s is {wait_for_agents_s}", hint="seconds, 0 to a day: 86400"
            )
        if mode not in ("direct", "shadow"):
            raise InputError(f"unknown mode {mode!r}", hint='"direct" or "shadow"')
        check_policy(policy)
        self._conversion = as_spec(conversion)
        deadlines = Deadlines() if deadlines is None else deadlines
        members = members_of(agents, timeout_s=deadlines.status_s)
        fleet = Fleet(
            None,
            token=token_from_env() if token is None else token,
            deadlines=deadlines,
            verify=tls_context(verify, cert),
            server_name=server_name_of(agents),
        )
        ranks = make_ranks(group, apart_s=deadlines.ranks_s)
        self._settings = PushSettings(
            members=members,
            policy=policy,
            wait_for_agents_s=wait_for_agents_s,
            make_transport=_maker(transport),
            check_finite=check_finite,
            mode=mode,
            pause_mode=pause_mode,
            reset_caches=reset_caches,
            deadlines=deadlines,
            ignore=(ignore,) if isinstance(ignore, str) else tuple(ignore),
            max_slot_nbytes=max_slot_bytes,
            coalesce_nbytes=coalesce_bytes,
            lend_nbytes=LEND_NBYTES if zero_copy_bytes is None else zero_copy_bytes,
            progress=make_progress(progress if ranks.rank == 0 else "off"),
        )
        self._quantization = quantization
        self._structures = Structures()
        self._held = Open(fleet, ranks)
        self._one_push = threading.Lock()
        # Also at exit: the transport must let go of the memory before the interpreter does (WS-9).
        self._close = weakref.finalize(self, self._held.close)

    def push(self, model: Weights, version: int | None = None) -> PushReport:
        """Make the engines serve these weights.

        The engines generate while the slots are filled, and stand still only for the writes and
        the commit.  Nothing may change the weights until this returns.

        Args:
            model: A module, plain or sharded (FSDP2, HSDP, tensor or expert parallel); checkpoint
                names and tensors as a mapping or as pairs; or a source of your own.
            version: Must be newer than every engine's; default: the next.

        Raises:
            NonFiniteError, ManifestError: The weights are wrong; nothing was sent.
            EnginePausedError: An engine was paused by hand; nothing was sent.
            RankFailedError: Another rank failed, is late, or is gone.
            WeightSyncError: Anything else.  ``context`` has ``phase``, ``version``, ``push_id``,
                ``elapsed_s`` and ``agents`` (what became of each), the notes say it to a person.
                Every agent was told to abort, as it was at a KeyboardInterrupt.
        """
        with self._alone():
            pushed = self._pushed(model)
            push = Push(self._held, self._settings, pushed, version)
            try:
                return push.run()
            except (StaleEpochError, NoSessionError):
                # Between our look at the status and begin, the engine was restarted or another
                # publisher came.  Once more, from the rendezvous on (WS-8); all ranks got this
                # error at the same step, so all of them do.
                if not push.wrote_nothing:
                    raise
                return Push(self._held, self._settings, pushed, version).run()

    def warmup(self, model: Weights) -> WarmupReport:
        """Find out before training starts whether a push will get through.

        Makes the rendezvous and the registrations that the first push would make, and writes to
        memory of every worker that no engine reads; the engines serve all the while.  A bad port,
        a wrong network card, a missing permission or a tensor that no engine takes is an error
        now; a wire that is far too slow is a ``SlowPathWarning``.  Every rank calls it.

        Args:
            model: What will be pushed: its names, shapes and placements count, not its values.

        Raises:
            WeightSyncError: As :meth:`push`; nothing was changed anywhere.
        """
        with self._alone():
            return Warmup(self._held, self._settings, self._pushed(model)).run()

    def catch_up(self, agent: str) -> AgentOutcome:
        """Give one agent the version of the last push, from the slots; the others serve on.

        For an agent that came after that push, was dropped by it, or whose engine was restarted.
        Every rank calls it.  An agent that has the version is let be.

        Args:
            agent: Its address.

        Raises:
            NoSessionError: There was no push yet, or the last one failed.
            InputError: What was sent is in memory no more: it went in rounds, or was sent from the
                trainer's own tensors, which have changed since.
            LayoutError: Its workers want what no worker of the last push wanted.
            WeightSyncError: As :meth:`push`, for that agent alone.
        """
        with self._alone():
            return CatchUp(self._held, self._settings, agent).run()

    def check(self) -> tuple[AgentOutcome, ...]:
        """See whether the agents are there: one ``GET /status`` each, all at once.

        For every step of training, so that a lost agent shows before the next push.  Every rank
        calls it, and gets the same answer.

        Returns:
            One outcome an agent; not ``ok``: a push would drop it now.

        Raises:
            WeightSyncError: The next push would fail, as the policy has it: of the first agent
                that is lost.
        """
        with self._alone():
            return check(self._held, self._settings)

    def _pushed(self, model: Weights) -> Pushed:
        return Pushed(model, self._conversion, self._quantization, self._structures)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nothing else that ranks do together goes on.

        Raises:
            InputError: This publisher is closed.
            PushInProgressError: Something does.
        """
        if not self._close.alive:
            raise InputError("this publisher is closed", hint="make a new one")
        if not self._one_push.acquire(blocking=False):
            raise PushInProgressError(
                "this publisher is in the middle of another push", hint="push from one thread"
            )
        try:
            yield
        finally:
            self._one_push.release()

    def status(self) -> list[dict[str, Any]]:
        """Every agent's ``GET /status``, in the order of ``agents``.

        Raises:
            AgentUnreachableError: One does not answer.
        """
        fleet, timeout_s = self._held.fleet, self._settings.deadlines.status_s
        fleet.use(self._settings.members())
        return fleet.each(lambda agent: agent.get("/status", timeout_s=timeout_s))

    def close(self) -> None:
        """Release memory and connections; the engines keep what they have.  Safe to call twice."""
        self._close()


def _maker(transport: str | Callable[[], Transport]) -> Callable[[], Transport]:
    if callable(transport):
        return transport
    return make_ucxx if transport == "ucxx" else make_nixl


def make_nixl() -> Transport:
    """The transport of a trainer."""
    # only here, so that a publisher with another transport needs no NIXL
    from weightsync.transport.cuda_ipc import CudaIpcTransport
    from weightsync.transport.nixl import NixlTransport
    from weightsync.transport.nixl_request import copying_threads

    gpu = cuda_address(torch.device("cuda"))
    # A trainer only writes, and makes progress while it waits: no thread runs beside its training.
    threads = copying_threads() if gpu is None else 1
    carrier = NixlTransport("trainer", progress_thread=False, gpu=gpu, threads=threads)
    return CudaIpcTransport(carrier)


def make_ucxx() -> Transport:
    """The transport of a trainer on hosts without NIXL."""
    from weightsync.transport.ucxx import UcxxTransport

    return UcxxTransport("trainer", progress_thread=False, gpu=cuda_address(torch.device("cuda")))
