"""A real S3 server (moto's) in a process of its own on the loopback interface, and buckets in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3

_START_S = 60.0


class Bucket:
    """A bucket and the environment in which S3 clients find it."""

    url = "s3://federation/fedhds"

    def __init__(self, endpoint: str) -> None:
        self.environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "key-of-the-tests",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        # Not by what is tested: boto3 is a client of its own.
        self._bucket: Any = boto3.resource(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        ).Bucket("federation")
        self.make()

    def make(self) -> None:
        """Makes the bucket."""
        self._bucket.create()

    def empty(self) -> None:
        """Deletes all objects."""
        self._bucket.objects.delete()

    def remove(self) -> None:
        """Deletes the bucket."""
        self.empty()
        self._bucket.delete()

    def objects(self) -> list[str]:
        """Names of the objects below the URL."""
        return sorted(item.key.removeprefix("fedhds/") for item in self._bucket.objects.all())

    def write(self, name: str, content: bytes) -> None:
        """Replaces an object."""
        self._bucket.put_object(Key=f"fedhds/{name}", Body=content)

    def read(self, name: str) -> bytes:
        """An object's bytes."""
        content: bytes = self._bucket.Object(f"fedhds/{name}").get()["Body"].read()
        return content


@contextmanager
def s3_server(folder: Path) -> Iterator[Bucket]:
    """A server with an empty bucket."""
    log = folder / "s3.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"], stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + _START_S
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the S3 server does not start"
            time.sleep(0.05)
        yield Bucket(found[0])
    finally:
        process.kill()
        process.wait()
