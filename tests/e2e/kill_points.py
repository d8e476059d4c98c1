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
from collections.abc import AsyncIterator, Callable
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

    def reached(self, *names: str) -> None:
        """Leaves the files of points that are one; dies when one of them is new and the pattern names it."""
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
    """Points of fedhds-server: every event and every change of phase around its commit, files, folds, answers."""
    import sqlalchemy as sa

    from fedhds.tensors.manifest import TensorSpec
    from fedhds.transfer.background_step import chunks
    from fedhds_server import checkpoint, coordinator
    from fedhds_server.aggregation.fedavg import FedAvg
    from fedhds_server.rpc.federation import FederationServicer
    from fedhds_server.run.engine import RunMachine
    from fedhds_server.storage.artifacts import ArtifactStore
    from fedhds_server.storage.sql import SqlStore

    handled: list[str] = []
    save, open_chunks = SqlStore.save, ArtifactStore.open_chunks

    def noting(method: Any) -> Any:
        def noted(machine: RunMachine, *events: Any) -> Any:
            before = machine.state.phase
            instructions = method(machine, *events)
            handled.extend(type(event).__name__ for event in events)
            if machine.state.phase is not before:
                handled.append(f"{before}-{machine.state.phase}")
            if handled[-1:] == ["FinalDelivered"] and all(site.delivered for site in machine.state.sites.values()):
                handled.append("last FinalDelivered")
            return instructions

        return noted

    def noted_save(*args: Any) -> None:
        save(*args)
        points.reached(*(f"{name} committed" for name in handled))
        handled.clear()

    def on_commit(_: object) -> None:
        points.reached(*(f"{name} uncommitted" for name in handled))

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
    ArtifactStore.open_chunks = pieces  # type: ignore[assignment, method-assign]
    for operation in ("append", "finish", "adopt", "delete", "sweep"):
        points.after(ArtifactStore, operation)
    for method in ("Enroll", "Register", "NextTask", "CompleteTask", "GetUpload"):
        answered(method)
    points.after(SqlStore, "load")
    points.after(SqlStore, "close")
    points.after(coordinator, "decide", "selection ended")
    points.after(FedAvg, "aggregate")
    points.after(coordinator, "write_checkpoint")
    points.at_call(checkpoint, "_sync", 2, "write_checkpoint underway")
    points.at_call(TensorSpec, "initial_value", 3, "initial adapter underway")
    points.at_call(FedAvg, "fold", 3, "fold underway")


def in_site(points: Points) -> None:
    """Points of fedhds-client: enrollment, transfers, every kind of task, delivery."""
    from fedhds.privacy.ledger import Ledger
    from fedhds_client import computation, daemon, delivery, link, release, run_models, workbench
    from fedhds_client.models.adapter import AdapterModel
    from fedhds_client.site import Site

    computing = ""
    report, call, create = computation.Control.report, link.CoordinatorClient.call, link.CoordinatorClient.__init__

    def noted_report(control: computation.Control, share: float) -> None:
        if share < 1:
            points.reached(f"{computing} underway")
        report(control, share)

    def computed(kind: str) -> None:
        original = getattr(workbench.TaskExecutor, kind)

        def wrapped(*args: Any) -> Any:
            nonlocal computing
            computing = kind
            return original(*args)

        setattr(workbench.TaskExecutor, kind, wrapped)

    async def noted_call(self: Any, method: Any, request: Any, **kwargs: Any) -> Any:
        answer = await call(self, method, request, **kwargs)
        name = type(request).__name__.removesuffix("Request")
        if name in ("Enroll", "Register", "CompleteTask"):
            result = request.WhichOneof("result") if name == "CompleteTask" else None
            points.reached(f"{name} heard" + (f" on {result}" if result else ""))
        return answer

    def cut(stream: Callable[..., Any], name: str) -> Callable[..., Any]:
        """`stream`, with a point where a third message follows."""

        async def counted(messages: Any) -> AsyncIterator[Any]:
            number = 0
            async for message in messages:
                number += 1
                if number == 4:
                    points.reached(name)
                yield message

        if name == "upload underway":
            return lambda requests: stream(counted(requests))
        return lambda request: counted(stream(request))

    def noted_create(self: Any, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        self.federation.Upload = cut(self.federation.Upload, "upload underway")
        self.federation.Download = cut(self.federation.Download, "download underway")

    computation.Control.report = noted_report  # type: ignore[assignment, method-assign]
    link.CoordinatorClient.call = noted_call  # type: ignore[method-assign]
    link.CoordinatorClient.__init__ = noted_create  # type: ignore[method-assign]
    # For a coordinator that comes back within a second, dozens of times.
    link._MAX_PAUSE_S = 0.5
    for kind in ("select", "train", "evaluate"):
        computed(kind)
    points.after(Site, "next_session")
    points.after(Site, "keep_session")
    points.at_call(run_models, "load_models", 1, "model load begins")
    points.after(release, "save_clusters")
    points.after(Ledger, "record", "ledger entry made")
    points.after(AdapterModel, "save", "update saved")
    points.after(workbench.TaskExecutor, "train")
    points.at_call(delivery, "_place", 3, "delivery underway")
    points.after(daemon, "write_adapter_folder", "delivery ended")


if __name__ == "__main__":
    folder, pattern, *sys.argv = sys.argv[1:]
    {"fedhds-server": in_coordinator, "fedhds-client": in_site}[Path(sys.argv[0]).name](Points(Path(folder), pattern))
    runpy.run_path(sys.argv[0], run_name="__main__")
