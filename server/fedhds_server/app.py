"""Settings to an assembled, running coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import resource
import secrets
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fedhds import __version__
from fedhds.errors import NotLeading, SettingsError, StorageError
from fedhds.liveness import watch_loop
from fedhds.runtime.files import locked, make_folder, replace_file
from fedhds.security.credentials import TlsFiles, server_credentials
from fedhds.settings import is_loopback
from fedhds.signals import on_signal
from fedhds.v1 import federation_pb2_grpc as rpc
from fedhds_server.aggregation import AGGREGATORS
from fedhds_server.artifacts import ArtifactStore
from fedhds_server.coordinator import Coordinator
from fedhds_server.leadership import Leadership
from fedhds_server.operations import OperationsServicer
from fedhds_server.readiness import Readiness
from fedhds_server.remote_artifacts import open_artifacts
from fedhds_server.selection import STRATEGIES
from fedhds_server.servicer import FederationServicer
from fedhds_server.settings import ServerSettings
from fedhds_server.state import Phase, RunState
from fedhds_server.store.base import Store
from fedhds_server.store.sql import SqlStore
from fedhds_server.term import SERVICES, Term
from fedhds_server.wire import new_server

logger = logging.getLogger(__name__)

# Adapters of the largest open models at rank 64 stay below; a claim beyond it is a mistake or an attack.
_LARGEST_UPLOAD = 64 << 30
_DRAIN_S = 5.0
# mallopt's M_TRIM_THRESHOLD, free bytes that are kept; M_MMAP_THRESHOLD, blocks up to which size come from them; and
# M_ARENA_MAX: a heap per thread would keep as much for each.
_MALLOC = {-1: 64 << 20, -3: 8 << 20, -8: 2}


async def serve(chosen: ServerSettings) -> int:
    """Runs the coordinator until its run is over and delivered, or a signal; returns the exit status."""
    tls = TlsFiles.from_settings(chosen.tls_ca, chosen.tls_cert, chosen.tls_key)
    _keep_memory()
    # A fold holds the file of every update of a round open, and every site one connection.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with _run_folder(chosen.run_folder) as (folder, holder), contextlib.closing(_store(chosen, folder)) as store:
        if state := store.load():
            # A standby that could not take over says so now, not when it is needed.
            _check_same_run(state, chosen)
        term = Term()
        server = new_server()
        FederationServicer(term.leading).register(server)
        rpc.add_OperationsServicer_to_server(OperationsServicer(term.leading), server)
        health_pb2_grpc.add_HealthServicer_to_server(term.health, server)
        reflection.enable_server_reflection([*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        port = _bind(server, chosen.listen, tls)
        host = chosen.listen.rpartition(":")[0]
        leadership = Leadership(store, holder, f"{socket.gethostname()}:{port}")
        await term.stand_by()
        await server.start()
        replace_file(folder / "address", f"{host}:{port}\n")
        logger.info(
            "fedhds-server %s listens on %s:%d (%s)", __version__, host, port, "mutual TLS" if tls else "no TLS"
        )
        try:
            async with _watched(chosen.http, Readiness(store, folder, term), leadership):
                work = asyncio.create_task(_lead(chosen, folder, store, leadership, term))
                exit_status = on_signal(work.cancel)
                coordinator = await work
        except asyncio.CancelledError:
            logger.info("stopped; start again on %s to go on", chosen.run_folder)
            return exit_status()
        finally:
            await term.health.enter_graceful_shutdown()
            await server.stop(_DRAIN_S)
            leadership.close()
            (folder / "address").unlink(missing_ok=True)
        logger.info("checkpoint: %s", coordinator.checkpoint)
        return 1 if coordinator.state.phase is Phase.FAILED else 0


@contextlib.asynccontextmanager
async def _watched(address: str, readiness: Readiness, leadership: Leadership) -> AsyncIterator[None]:
    """Looks after the process, and tells of it at `address` (empty: to gRPC's health service alone)."""
    watching = [asyncio.create_task(body) for body in (readiness.watch(), watch_loop())]
    try:
        async with contextlib.AsyncExitStack() as stack:
            if address:
                from fedhds.web import served
                from fedhds_server.metrics import run_families
                from fedhds_server.page import StatusPage

                term = readiness.term
                page = StatusPage(term, leadership, loopback=is_loopback(address.rpartition(":")[0]))
                await stack.enter_async_context(
                    served(address, lambda: run_families(readiness), lambda: term.problems, page.routes)
                )
                # Before the server waits for its connections.
                stack.callback(page.close)
            yield
    finally:
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)


async def _lead(chosen: ServerSettings, folder: Path, store: Store, leadership: Leadership, term: Term) -> Coordinator:
    """Stands by until this process leads, and again when it does so no more; returns when the run is over."""
    while True:
        await leadership.gained()
        try:
            state = await asyncio.to_thread(_opened, store, chosen)
            artifacts = await asyncio.to_thread(_artifacts, chosen, folder, state)
            coordinator = Coordinator(
                state,
                store=store,
                artifacts=artifacts,
                folder=folder,
                strategy=STRATEGIES[state.spec.strategy],
                aggregator=AGGREGATORS["fedavg"],
                keep_updates=chosen.keep_updates,
            )
            async with term.of(coordinator):
                await leadership.kept_during(coordinator.run())
            return coordinator
        except NotLeading as error:
            logger.warning("%s; standing by", error)
        finally:
            await leadership.given_up()


def _keep_memory() -> None:
    """Spares chunk after chunk the way to the kernel, and the collector the walk over what libraries hold for ever."""
    gc.freeze()
    with contextlib.suppress(AttributeError):  # another C library than glibc
        # By default every freed chunk at the heap's end goes back to the kernel and the next one comes as fresh, zeroed
        # pages: that was a third of the coordinator's CPU time while adapters of 20 MiB came and went.
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC.items():
            mallopt(option, value)


def _bind(server: grpc.aio.Server, address: str, tls: TlsFiles | None) -> int:
    try:
        if tls:
            return int(server.add_secure_port(address, server_credentials(tls)))
        return int(server.add_insecure_port(address))
    except RuntimeError as error:
        raise SettingsError(
            "--listen", f"cannot listen on {address}: the port is taken or the address is not this machine's"
        ) from error


def _store(chosen: ServerSettings, folder: Path) -> SqlStore:
    return SqlStore.at(chosen.store.get_secret_value()) if chosen.store else SqlStore.in_folder(folder)


def _artifacts(chosen: ServerSettings, folder: Path, state: RunState) -> ArtifactStore:
    artifacts = open_artifacts(chosen.artifacts, folder, state.run_id, largest_upload=_LARGEST_UPLOAD)
    artifacts.sweep(_named(state))
    return artifacts


def _opened(store: Store, chosen: ServerSettings) -> RunState:
    """The run in the store, or a new one.

    Raises SettingsError when the store's run is another, StorageError when only the run's artifacts are there.
    """
    state = store.load()
    if state is None:
        if any((chosen.run_folder / "artifacts").glob("*")):
            raise StorageError(
                f"{chosen.run_folder} holds a run's artifacts but the database has no state of it; restore the "
                "database, or choose another --run-folder for a new run"
            )
        state = RunState(run_id=secrets.token_hex(8), spec=chosen.run_spec())
        store.save(state)
        logger.info("run %s begins", state.run_id)
        return state
    _check_same_run(state, chosen)
    logger.info("going on with run %s: %s", state.run_id, state.message or state.phase.value)
    return state


def _check_same_run(state: RunState, chosen: ServerSettings) -> None:
    spec = chosen.run_spec()
    if state.spec == spec:
        return
    old, new = state.spec.model_dump(), spec.model_dump()
    changed = [f"{name} {old[name]!r}, now {new[name]!r}" for name in old if old[name] != new[name]]
    setting, place, another = (
        ("--store", "the database", "database") if chosen.store else ("--run-folder", f"{chosen.run_folder}", "folder")
    )
    raise SettingsError(
        setting,
        f"{place} holds a run with other settings ({'; '.join(changed)}); go on with the same settings, or choose "
        f"another {another} for a new run",
    )


def _named(state: RunState) -> set[str]:
    artifacts = [*state.adapters.values(), *(update.artifact for update in state.updates.values())]
    return {artifact.digest for artifact in artifacts}


@contextlib.contextmanager
def _run_folder(folder: Path) -> Iterator[tuple[Path, str]]:
    """The run folder, made if need be and held against a second coordinator, and the name that is its own for good."""
    with contextlib.ExitStack() as stack:
        try:
            make_folder(folder)
            descriptor = stack.enter_context(locked(folder / "lock"))
            holder = os.read(descriptor, 64).decode()
            if not holder:
                holder = secrets.token_hex(16)
                os.write(descriptor, holder.encode())
        except BlockingIOError as error:
            raise SettingsError(
                "--run-folder", f"{folder} is in use by another coordinator; stop it or choose another folder"
            ) from error
        except OSError as error:
            raise StorageError(
                f"cannot write to the run folder {folder}: {error.strerror}; choose another with --run-folder"
            ) from error
        yield folder.resolve(), holder
