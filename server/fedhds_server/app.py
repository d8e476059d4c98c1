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
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fedhds import __version__
from fedhds.errors import NotLeading, RunOver, SettingsError, StorageError
from fedhds.runtime.files import locked, make_folder, replace_file, take_back
from fedhds.runtime.liveness import watch_loop
from fedhds.runtime.signals import on_signal
from fedhds.security.credentials import TlsFiles, server_credentials
from fedhds.settings import flag, flat, is_loopback
from fedhds.v2 import status_pb2_grpc as status_rpc
from fedhds_server.coordinator import Coordinator
from fedhds_server.coordinator.admission import Admission
from fedhds_server.coordinator.uploads import owner_of, uploading_sites
from fedhds_server.leadership.gate import SERVICES, LeaderGate
from fedhds_server.leadership.leadership import Leadership
from fedhds_server.leadership.readiness import Readiness
from fedhds_server.observers import OBSERVERS, TRACKERS, ObserverContext, RunObserver
from fedhds_server.rpc.federation import FederationServicer
from fedhds_server.rpc.grpc_server import new_server
from fedhds_server.rpc.operations import OperationsServicer
from fedhds_server.rpc.protocol_1 import Protocol1Handler
from fedhds_server.run.base_model import check_confirmation, model_confirmed
from fedhds_server.run.events import ModelConfirmed, Record
from fedhds_server.run.state import Phase, RunState
from fedhds_server.settings import ServerSettings
from fedhds_server.storage.artifacts import ArtifactStore
from fedhds_server.storage.base import Store
from fedhds_server.storage.object_store import open_artifacts
from fedhds_server.storage.sql import SqlStore

logger = logging.getLogger(__name__)

# Adapters of the largest open models at rank 64 stay below; a claim beyond it is a mistake or an attack.
_MAX_UPLOAD = 64 << 30
_DRAIN_S = 5.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# mallopt's M_TRIM_THRESHOLD, free bytes that are kept; M_MMAP_THRESHOLD, blocks up to which size come from them; and
# M_ARENA_MAX: a heap per thread would keep as much for each.
_MALLOC = {-1: 64 << 20, -3: 8 << 20, -8: 2}


async def serve(settings: ServerSettings) -> int:
    """Runs the coordinator until its run is over and delivered, or a signal; returns the exit status."""
    tls = TlsFiles.from_settings(settings.tls_ca, settings.tls_cert, settings.tls_key)
    settings.check_start()
    admission = Admission.of(settings)
    # What a run keeps is for the coordinator's user alone.
    os.umask(0o077)
    _keep_memory()
    # Aggregation has the file of every update of a round open, and every site one connection.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with _run_folder(settings.run_folder) as (folder, holder), contextlib.closing(_store(settings, folder)) as store:
        if state := store.load():
            # A standby that could not take over says so now, not when it is needed.
            _check_same_run(state, settings)
        gate = LeaderGate()
        server = new_server(gate.leading)
        FederationServicer(gate.leading).register(server)
        status_rpc.add_OperationsServicer_to_server(OperationsServicer(gate.leading), server)
        server.add_generic_rpc_handlers((Protocol1Handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(gate.health, server)
        reflection.enable_server_reflection([*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        port = _bind(server, settings.listen, tls)
        host = settings.listen.rpartition(":")[0]
        leadership = Leadership(store, holder, f"{socket.gethostname()}:{port}")
        await gate.stand_by()
        await server.start()
        replace_file(folder / "address", f"{host}:{port}\n")
        logger.info(
            "fedhds-server %s listens on %s:%d (%s)", __version__, host, port, "mutual TLS" if tls else "no TLS"
        )
        try:
            async with _watched(settings.http, Readiness(store, folder, gate), leadership):
                work = asyncio.create_task(_lead(settings, folder, store, leadership, gate, admission))
                exit_status = on_signal(work.cancel)
                coordinator = await work
        except asyncio.CancelledError:
            logger.info("stopped; start again on %s to go on", settings.run_folder)
            return exit_status()
        finally:
            await gate.health.enter_graceful_shutdown()
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
                from fedhds.runtime.http import served
                from fedhds_server.dashboard.dashboard import Dashboard
                from fedhds_server.metrics import run_families

                gate = readiness.gate
                dashboard = Dashboard(gate, leadership, loopback=is_loopback(address.rpartition(":")[0]))
                await stack.enter_async_context(
                    served(address, lambda: run_families(readiness), lambda: gate.problems, dashboard.routes)
                )
                # Before the server waits for its connections.
                stack.callback(dashboard.close)
            yield
    finally:
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)


async def _lead(
    settings: ServerSettings,
    folder: Path,
    store: Store,
    leadership: Leadership,
    gate: LeaderGate,
    admission: Admission,
) -> Coordinator:
    """Stands by until this process leads, and again when it does so no more; returns when the run is over."""
    while True:
        await leadership.gained()
        try:
            state = await asyncio.to_thread(_opened, store, settings)
            artifacts = await asyncio.to_thread(_artifacts, settings, folder, state)
            coordinator = Coordinator(
                state,
                store=store,
                artifacts=artifacts,
                folder=folder,
                observers=_observers(settings, ObserverContext(folder, state.spec)),
                keep_updates=settings.keep_updates,
                admission=admission,
            )
            async with gate.of(coordinator):
                await leadership.kept_during(coordinator.run())
            return coordinator
        except NotLeading as error:
            logger.warning("%s; standing by", error)
        finally:
            await leadership.given_up()


def _observers(settings: ServerSettings, context: ObserverContext) -> list[RunObserver]:
    kinds = [*OBSERVERS.values(), *(TRACKERS[name] for name in settings.track)]
    return [observer(context) for observer in kinds]


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


def _store(settings: ServerSettings, folder: Path) -> SqlStore:
    return SqlStore.at(settings.store.get_secret_value()) if settings.store else SqlStore.in_folder(folder)


def _artifacts(settings: ServerSettings, folder: Path, state: RunState) -> ArtifactStore:
    artifacts = open_artifacts(settings.artifacts, folder, state.run_id, largest_upload=_MAX_UPLOAD)
    artifacts.sweep({artifact.digest for artifact in state.artifacts}, set(map(owner_of, uploading_sites(state))))
    return artifacts


def _opened(store: Store, settings: ServerSettings) -> RunState:
    """The run in the store, or a new one.

    Raises SettingsError when the store's run is another, StorageError when only the run's artifacts are there.
    """
    state = store.load()
    if state is None:
        if any((settings.run_folder / "artifacts").glob("*")):
            raise StorageError(
                f"{settings.run_folder} holds a run's artifacts but the database has no state of it; restore the "
                "database, or choose another --run-folder for a new run"
            )
        expected = settings.expected_fingerprint
        state = RunState(run_id=secrets.token_hex(8), spec=settings.run_spec(), expected_fingerprint=expected)
        store.save(state)
        logger.info("run %s begins", state.run_id)
        return state
    _check_same_run(state, settings)
    _expect_model(state, settings.expected_fingerprint)
    logger.info("going on with run %s: %s", state.run_id, state.message or state.phase.value)
    return state


def _expect_model(state: RunState, fingerprint: str) -> None:
    """What the operator's flag says now holds, as if confirmed; raises SettingsError when it is too late for it."""
    if not fingerprint or fingerprint == state.expected_fingerprint or state.phase.over:
        return
    try:
        check_confirmation(state, fingerprint)
    except RunOver as error:
        raise SettingsError("--expected-fingerprint", str(error)) from error
    for instruction in model_confirmed(state, ModelConfirmed(time.time(), fingerprint, "--expected-fingerprint")):
        if isinstance(instruction, Record):
            logger.warning("%s", instruction.message)


def _check_same_run(state: RunState, settings: ServerSettings) -> None:
    spec = settings.run_spec()
    if state.spec == spec:
        return
    old, new = flat(state.spec), flat(spec)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    changed = [f"{flag(name)} {old.get(name)!r}, now {new.get(name)!r}" for name in names]
    setting, place, another = (
        ("--store", "the database", "database")
        if settings.store
        else ("--run-folder", f"{settings.run_folder}", "folder")
    )
    raise SettingsError(
        setting,
        f"{place} contains a run with other settings ({'; '.join(changed)}); go on with the same settings, or choose "
        f"another {another} for a new run",
    )


@contextlib.contextmanager
def _run_folder(folder: Path) -> Iterator[tuple[Path, str]]:
    """The run folder, made if need be and locked against a second coordinator, and the name of who holds its lock.

    The name is the lease's holder, and a process with the holder's name takes the lease over without waiting. So two
    processes must never have one name at the same time, but the same folder started again should have it: what held the
    lease before is gone then, as the kernel gave its lock away. A name kept in the folder would travel with every copy
    of it, and two copies on one database would depose each other without end. So the name says which lock is held:
    device and inode of the lock file tell it from every other file of a running kernel, and the kernel's boot id tells
    that kernel from all others. A copy, a restored backup or a host that was started again has another name, and waits
    until the lease has run out, for seconds. Without a boot id the name is new at each start, and always waits.
    """
    with contextlib.ExitStack() as stack:
        try:
            make_folder(folder, private=True)
            take_back(folder)
            lock = os.fstat(stack.enter_context(locked(folder / "lock")))
        except BlockingIOError as error:
            raise SettingsError(
                "--run-folder", f"{folder} is in use by another coordinator; stop it or choose another folder"
            ) from error
        except OSError as error:
            raise StorageError(
                f"cannot write to the run folder {folder}: {error.strerror}; choose another with --run-folder"
            ) from error
        try:
            kernel = _BOOT_ID.read_text(encoding="ascii").strip()
        except OSError:
            kernel = secrets.token_hex(16)
        yield folder.resolve(), f"{kernel}/{lock.st_dev}/{lock.st_ino}"
