"""Runs a console script that ends itself by SIGKILL at named points: `kill_points.py FOLDER PATTERN SCRIPT FLAG...`.

Every point that the process reaches leaves a file in FOLDER; at a point that PATTERN matches, the first process that
reaches it dies there. What runs is the installed program: points are put around its functions before it starts.
"""

from __future__ import annotations

import os
import re
import runpy
import signal
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

# Small against the adapter of these runs, so that a transfer has a middle.
CHUNK_BYTES = 1 << 15


class Points:
    """The points of one process; several may share a folder."""

    def __init__(self, folder: Path, pattern: str) -> None:
        self._folder = folder
        self._pattern = re.compile(pattern)
        self._known: set[str] = set()
        self.undivided = threading.RLock()
        """What is done while this is held has no point of another thread in its middle."""

    def reached(self, *names: str) -> None:
        """Leaves the files of points that are one; dies when one of them is new and the pattern names it."""
        with self.undivided:
            dies = False
            for name in names:
                if name in self._known:
                    continue
                self._known.add(name)
                try:
                    os.close(os.open(self._folder / name, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    continue
                dies = dies or bool(self._pattern.fullmatch(name))
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)

    def after(self, owner: Any, attribute: str, name: str = "") -> None:
        """Puts a point after every call of `owner.attribute`."""
        original = getattr(owner, attribute)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.reached(name or f"{attribute} ended")
            return result

        setattr(owner, attribute, wrapped)

    def at_call(self, owner: Any, attribute: str, number: int, name: str) -> None:
        """Puts a point before the `number`-th call of `owner.attribute` in a process."""
        original, calls = getattr(owner, attribute), 0

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                self.reached(name)
            return original(*args, **kwargs)

        setattr(owner, attribute, wrapped)


def in_coordinator(points: Points) -> None:
    """Points of fedhds-server: events and changes of activity around their commit, files, aggregation, answers."""
    import sqlalchemy as sa

    from fedhds.tensors.manifest import TensorSpec
    from fedhds.transfer import chunks
    from fedhds_server.aggregation.fedavg import FedAvg
    from fedhds_server.coordinator import effects
    from fedhds_server.rpc.federation import FederationServicer
    from fedhds_server.run.activity import activity
    from fedhds_server.run.engine import RunMachine
    from fedhds_server.run.events import NextStep, ResultReceived, StageResolved
    from fedhds_server.storage import checkpoint
    from fedhds_server.storage.artifacts import ArtifactStore
    from fedhds_server.storage.sql import SqlStore
    from fedhds_server.workflows import WORKFLOWS, selection

    handled: list[str] = []
    save, adopt, open_chunks = SqlStore.save, ArtifactStore.adopt, ArtifactStore.open_chunks

    def name_of(event: Any) -> str:
        """The event's class, and what it brings where events of one class differ."""
        match event:
            case ResultReceived(result=result):
                return f"ResultReceived {result.TypeName().rpartition('.')[2]}"
            case StageResolved(stage=stage, outcome=NextStep()) if stage.startswith("secure-train"):
                return f"StageResolved NextStep {stage.partition('.')[2].partition('-')[0] or 0}"
            case StageResolved(outcome=outcome):
                return f"StageResolved {type(outcome).__name__}"
        return type(event).__name__

    def noting(method: Any) -> Any:
        def noted(machine: RunMachine, *events: Any) -> Any:
            before = activity(machine.state)
            instructions = method(machine, *events)
            handled.extend(map(name_of, events))
            if (now := activity(machine.state)) != before:
                handled.append(f"{before}-{now}")
            if handled[-1:] == ["FinalDelivered"] and all(site.delivered for site in machine.state.sites.values()):
                handled.append("last FinalDelivered")
            return instructions

        return noted

    def noted_save(*args: Any) -> None:
        # Nothing else kills between a commit and its point, which would then never be reached.
        with points.undivided:
            save(*args)
            points.reached(*(f"{name} committed" for name in handled))
            handled.clear()

    def on_commit(_: object) -> None:
        points.reached(*(f"{name} uncommitted" for name in handled))

    def noted_adopt(store: ArtifactStore, path: Path, artifact: Any) -> None:
        adopt(store, path, artifact)
        # The scratch file of a server optimizer's slot, which is adopted after the adapter.
        points.reached("slot adopted" if path.name.startswith("slot-") else "adapter adopted")

    def pieces(store: ArtifactStore, artifact: Any, offset: int, chunk_size: int) -> Any:
        for number, chunk in enumerate(open_chunks(store, artifact, offset, chunk_size)):
            if number == 2:
                points.reached("download underway")
            yield chunk

    def answered(method: str) -> None:
        original = getattr(FederationServicer, method)

        async def wrapped(self: Any, request: Any, context: Any) -> Any:
            answer = await original(self, request, context)
            points.reached(f"{method} answered")
            return answer

        setattr(FederationServicer, method, wrapped)

    RunMachine.apply = noting(RunMachine.apply)  # type: ignore[method-assign]
    RunMachine.advance = noting(RunMachine.advance)  # type: ignore[method-assign]
    chunks.chunk_size = lambda transfers: CHUNK_BYTES
    SqlStore.save = noted_save  # type: ignore[assignment, method-assign]
    sa.event.listen(sa.engine.Engine, "commit", on_commit)
    ArtifactStore.adopt = noted_adopt  # type: ignore[assignment, method-assign]
    ArtifactStore.open_chunks = pieces  # type: ignore[assignment, method-assign]
    for operation in ("append", "finish", "delete", "sweep"):
        points.after(ArtifactStore, operation)
    for method in ("Enroll", "Register", "NextTask", "CompleteTask", "GetUpload", "ConfirmDelivery"):
        answered(method)
    points.after(SqlStore, "load")
    points.after(SqlStore, "close")
    points.after(selection, "decide", "selection ended")
    for kind, workflow in WORKFLOWS.items():
        # Before the event that says so is saved.
        points.after(type(workflow), "resolve", f"{kind} stage resolved")
    points.after(effects, "aggregate")
    points.after(effects, "write_checkpoint")
    points.at_call(checkpoint, "sync", 2, "write_checkpoint underway")
    points.at_call(TensorSpec, "initial_value", 3, "initial adapter underway")
    points.at_call(FedAvg, "combine", 3, "aggregate underway")


def in_site(points: Points) -> None:
    """Points of fedhds-client: enrollment, transfers, every kind of task, delivery."""
    from fedhds.privacy.ledger import Account
    from fedhds.tensors.codecs import Codec
    from fedhds_client import computation, executor, rpc_client, run_models
    from fedhds_client.secure.round_record import RoundRecord
    from fedhds_client.secure.site_round import SiteRound
    from fedhds_client.selection import federated_kmeans, fedhds
    from fedhds_client.site import Site
    from fedhds_client.tasks import TASKS
    from fedhds_client.updates import delivery

    computing = ""
    report = computation.Control.report
    call, create = rpc_client.CoordinatorClient.call, rpc_client.CoordinatorClient.__init__

    def noted_report(control: computation.Control, share: float) -> None:
        if share < 1:
            points.reached(f"{computing} underway")
        report(control, share)

    def computed(kind: str) -> None:
        task = type(TASKS[kind])
        original = task.run

        def wrapped(*args: Any) -> Any:
            nonlocal computing
            computing = kind
            result = original(*args)
            points.reached(f"{kind} ended")
            return result

        setattr(task, "run", wrapped)  # noqa: B010 - mypy takes an assignment for a mistake

    async def noted_call(self: Any, method: Any, request: Any, **kwargs: Any) -> Any:
        answer = await call(self, method, request, **kwargs)
        name = type(request).__name__.removesuffix("Request")
        if name in ("Enroll", "Register", "ConfirmDelivery"):
            points.reached(f"{name} heard")
        if name == "CompleteTask":
            points.reached(f"CompleteTask heard on {request.result.TypeName().rpartition('.')[2]}")
        return answer

    async def counted(messages: Any, name: str) -> AsyncIterator[Any]:
        """`messages`, with a point where a third one follows."""
        number = 0
        async for message in messages:
            number += 1
            if number == 4:
                points.reached(name)
            yield message

    class CountedDownload:
        """A call whose messages are counted."""

        def __init__(self, call: Any) -> None:
            self.cancel = call.cancel
            self._call = call

        def __aiter__(self) -> AsyncIterator[Any]:
            return counted(self._call, "download underway")

    def noted_create(self: Any, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        upload, download = self.federation.Upload, self.federation.Download
        self.federation.Upload = lambda requests: upload(counted(requests, "upload underway"))
        self.federation.Download = lambda request: CountedDownload(download(request))

    computation.Control.report = noted_report  # type: ignore[assignment, method-assign]
    rpc_client.CoordinatorClient.call = noted_call  # type: ignore[method-assign]
    rpc_client.CoordinatorClient.__init__ = noted_create  # type: ignore[method-assign]
    # For a coordinator that comes back within a second, dozens of times.
    rpc_client._MAX_PAUSE_S = 0.5
    for kind in TASKS:
        computed(kind)
    for step in ("keys", "shares", "begin_masking", "masks", "keep_masked", "sign", "open"):
        points.after(SiteRound, step, f"secure {step} ended")
    points.after(RoundRecord, "save", "record of a secure round saved")
    points.after(Site, "next_session")
    points.after(Site, "keep_session")
    points.at_call(run_models, "load_models", 1, "model load begins")
    for strategy in (fedhds, federated_kmeans):
        points.after(strategy, "save_clusters")
    points.after(Account, "record", "ledger entry made")
    # Complete on disk, but not yet with the note that says so.
    points.after(Codec, "write", "update written")
    # The last of three files.
    points.at_call(delivery, "replacing", 1, "delivery underway")
    points.after(executor, "write_adapter_folder", "delivery ended")


if __name__ == "__main__":
    folder, pattern, *sys.argv = sys.argv[1:]
    {"fedhds-server": in_coordinator, "fedhds-client": in_site}[Path(sys.argv[0]).name](Points(Path(folder), pattern))
    runpy.run_path(sys.argv[0], run_name="__main__")
