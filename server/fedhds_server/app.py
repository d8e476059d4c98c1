"""Settings to an assembled, running coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import secrets
from collections.abc import Iterator
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fedhds import __version__
from fedhds.errors import SettingsError, StorageError
from fedhds.runspec import RunSpec
from fedhds.security.credentials import TlsFiles, server_credentials
from fedhds.signals import on_signal
from fedhds.v1 import federation_pb2_grpc as rpc
from fedhds_server.aggregation import AGGREGATORS
from fedhds_server.coordinator import Coordinator
from fedhds_server.remote_artifacts import open_artifacts
from fedhds_server.selection import STRATEGIES
from fedhds_server.servicer import FederationServicer, OperationsServicer
from fedhds_server.settings import ServerSettings
from fedhds_server.state import Phase, RunState
from fedhds_server.store.base import Store
from fedhds_server.store.sql import SqlStore
from fedhds_server.wire import new_server

logger = logging.getLogger(__name__)

_SERVICES = ("fedhds.v1.Federation", "fedhds.v1.Operations")
# Adapters of the largest open models at rank 64 stay below; a claim beyond it is a mistake or an attack.
_LARGEST_UPLOAD = 64 << 30
_DRAIN_S = 5.0


async def serve(chosen: ServerSettings) -> int:
    """Runs the coordinator until its run is over and delivered, or a signal; returns the exit status."""
    tls = TlsFiles.from_settings(chosen.tls_ca, chosen.tls_cert, chosen.tls_key)
    # A fold holds two files of every update of a round open, and every site one connection.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with _run_folder(chosen.run_folder) as folder, contextlib.closing(SqlStore.in_folder(folder)) as store:
        state = _opened(store, chosen.run_spec(), chosen.run_folder)
        artifacts = open_artifacts(chosen.artifacts, folder, state.run_id, largest_upload=_LARGEST_UPLOAD)
        artifacts.sweep(_named(state))
        coordinator = Coordinator(
            state,
            store=store,
            artifacts=artifacts,
            folder=folder,
            strategy=STRATEGIES[state.spec.strategy],
            aggregator=AGGREGATORS["fedavg"],
            keep_updates=chosen.keep_updates,
        )
        server = new_server()
        rpc.add_FederationServicer_to_server(FederationServicer(coordinator, artifacts), server)
        rpc.add_OperationsServicer_to_server(OperationsServicer(coordinator), server)
        healthy = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        names = [*_SERVICES, health.SERVICE_NAME]
        reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
        port = _bind(server, chosen.listen, tls)
        host = chosen.listen.rpartition(":")[0]
        work = asyncio.create_task(coordinator.run())
        exit_status = on_signal(work.cancel)
        await server.start()
        for name in ("", *names):
            await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
        try:
            (folder / "address").write_text(f"{host}:{port}\n")
        except OSError as error:
            raise StorageError(f"cannot write {folder / 'address'}: {error.strerror}") from error
        logger.info(
            "fedhds-server %s listens on %s:%d (%s)", __version__, host, port, "mutual TLS" if tls else "no TLS"
        )
        try:
            await work
        except asyncio.CancelledError:
            logger.info("stopped; start again on %s to go on", chosen.run_folder)
            return exit_status()
        finally:
            await healthy.enter_graceful_shutdown()
            await server.stop(_DRAIN_S)
            (folder / "address").unlink(missing_ok=True)
        logger.info("checkpoint: %s", coordinator.checkpoint)
        return 1 if coordinator.state.phase is Phase.FAILED else 0


def _bind(server: grpc.aio.Server, address: str, tls: TlsFiles | None) -> int:
    try:
        if tls:
            return int(server.add_secure_port(address, server_credentials(tls)))
        return int(server.add_insecure_port(address))
    except RuntimeError as error:
        raise SettingsError(
            "--listen", f"cannot listen on {address}: the port is taken or the address is not this machine's"
        ) from error


def _opened(store: Store, spec: RunSpec, folder: Path) -> RunState:
    """The run in the store, or a new one; raises SettingsError when the store's run is another."""
    state = store.load()
    if state is None:
        state = RunState(run_id=secrets.token_hex(8), spec=spec)
        store.save(state)
        return state
    if state.spec != spec:
        old, new = state.spec.model_dump(), spec.model_dump()
        changed = [f"{name} {old[name]!r}, now {new[name]!r}" for name in old if old[name] != new[name]]
        raise SettingsError(
            "--run-folder",
            f"{folder} holds a run with other settings ({'; '.join(changed)}); go on with the same settings, or choose "
            "another folder for a new run",
        )
    logger.info("going on with run %s: %s", state.run_id, state.message or state.phase.value)
    return state


def _named(state: RunState) -> set[str]:
    artifacts = [*state.adapters.values(), *(update.artifact for update in state.updates.values())]
    return {artifact.digest for artifact in artifacts}


@contextlib.contextmanager
def _run_folder(folder: Path) -> Iterator[Path]:
    """The run folder, made if need be and held against a second coordinator."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StorageError(
            f"cannot write to the run folder {folder}: {error.strerror}; choose another with --run-folder"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingsError(
                "--run-folder", f"{folder} is in use by another coordinator; stop it or choose another folder"
            ) from error
        yield folder.resolve()
    finally:
        os.close(descriptor)
