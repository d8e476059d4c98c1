"""Commands of several processes under `accelerate launch`."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.federation import free_port


def launched(command: list[str]) -> list[str]:
    """A command for two processes; --multi_gpu is accelerate's word for several, also on a machine without a GPU."""
    flags = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    # So that the launcher opens no store, which would listen on all interfaces.
    flags += ["--rdzv_backend=c10d", "--rdzv_conf=store_type=file"]
    return [
        "/usr/bin/env",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        str(Path(sys.executable).parent / "accelerate"),
        "launch",
        *flags,
        f"--main_process_port={free_port()}",
        *command,
    ]
