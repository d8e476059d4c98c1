"""`fedhds-client`: flags to settings to a running site."""

from __future__ import annotations

import os
import sys

from fedhds.runtime.logging import configure_logging
from fedhds.settings import load, run_main
from fedhds_client.home import make_home
from fedhds_client.settings import ClientSettings

_DESCRIPTION = (
    "A site of a federation: it reads its own instruction data, selects, trains and evaluates under the coordinator's "
    "direction, and sends only cluster centroids, adapter tensors and sums. It dials out; nothing dials in."
)


def main() -> None:
    """Console entry point."""
    run_main("fedhds-client", _run)


def _run() -> int:
    settings = load(
        ClientSettings,
        program="fedhds-client",
        description=_DESCRIPTION,
        arguments=sys.argv[1:],
        environment=os.environ,
    )
    configure_logging(settings.log_level, settings.log_format)
    # gRPC's own log repeats every broken connection at error level; what matters is logged by the daemons.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # No telemetry: a site talks to the coordinator and, for a hub model, to the hub.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    make_home(settings.state)
    import asyncio
    import warnings

    # PEFT and transformers warn each other of deprecations, which tells a site's operator nothing.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    from fedhds_client.daemon import run_sites

    return asyncio.run(run_sites(settings))
