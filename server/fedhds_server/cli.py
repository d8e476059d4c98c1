"""`fedhds-server`: flags to settings to a running coordinator."""

from __future__ import annotations

import os
import sys

from fedhds import settings
from fedhds.runtime.logging import configure_logging
from fedhds_server.settings import ServerSettings

_DESCRIPTION = (
    "The coordinator of a federation: it enrolls sites, selects, hands out training and evaluation, combines the "
    "updates into one adapter, and never sees a row of data. Started again on the same run folder, it goes on."
)


def main() -> None:
    """Console entry point."""
    settings.run_main("fedhds-server", _run)


def _run() -> int:
    server_settings = settings.load(
        ServerSettings,
        program="fedhds-server",
        description=_DESCRIPTION,
        arguments=sys.argv[1:],
        environment=os.environ,
    )
    configure_logging(server_settings.log_level, server_settings.log_format)
    # gRPC's own log repeats every broken connection at error level; what matters is logged by the daemons.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import asyncio

    from fedhds_server.app import serve

    return asyncio.run(serve(server_settings))
