"""Artifacts: uploads that resume, count only with the right digest, and survive restarts and each other."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhds.adapter import Artifact
from fedhds.errors import ArtifactError, StorageError
from fedhds.v1 import federation_pb2 as pb
from fedhds_server.artifacts import ArtifactStore

LARGEST = 1 << 20
CONTENT = bytes(range(256)) * 4


def reference(content: bytes) -> Artifact:
    return Artifact(hashlib.sha256(content).hexdigest(), len(content))


ARTIFACT = reference(CONTENT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "artifacts"


@pytest.fixture
def store(folder: Path) -> ArtifactStore:
    return ArtifactStore(folder, largest_upload=LARGEST)


def held(store: ArtifactStore, artifact: Artifact = ARTIFACT, offset: int = 0, chunk_size: int = 100) -> bytes:
    return b"".join(store.open_chunks(artifact, offset, chunk_size))


def upload(store: ArtifactStore, content: bytes = CONTENT) -> Artifact:
    artifact = reference(content)
    store.append(artifact, 0, content)
    store.finish(artifact)
    return artifact


def test_nothing_is_held_of_an_artifact_that_nobody_sent(store: ArtifactStore) -> None:
    assert not store.has(ARTIFACT)
    assert store.received(ARTIFACT) == 0
    with pytest.raises(ArtifactError, match=f"there is no artifact {ARTIFACT.digest[:12]}"):
        held(store)
    with pytest.raises(ArtifactError, match="nothing of this artifact"):
        store.finish(ARTIFACT)


def test_an_upload_counts_when_it_is_finished(store: ArtifactStore) -> None:
    for offset in range(0, len(CONTENT), 300):
        assert store.received(ARTIFACT) == offset
        store.append(ARTIFACT, offset, CONTENT[offset : offset + 300])
    assert store.received(ARTIFACT) == ARTIFACT.size
    assert not store.has(ARTIFACT)
    store.finish(ARTIFACT)
    assert store.has(ARTIFACT)
    assert store.path(ARTIFACT).read_bytes() == CONTENT
    assert store.received(ARTIFACT) == ARTIFACT.size


def test_an_upload_goes_on_after_a_restart_where_it_stood(folder: Path) -> None:
    ArtifactStore(folder, largest_upload=LARGEST).append(ARTIFACT, 0, CONTENT[:400])
    again = ArtifactStore(folder, largest_upload=LARGEST)
    assert again.received(ARTIFACT) == 400
    again.append(ARTIFACT, 400, CONTENT[400:])
    again.finish(ARTIFACT)
    assert held(ArtifactStore(folder, largest_upload=LARGEST)) == CONTENT


def test_an_upload_cannot_leave_a_gap(store: ArtifactStore) -> None:
    store.append(ARTIFACT, 0, CONTENT[:100])
    with pytest.raises(ArtifactError, match="goes on at byte 101, only 100 are here"):
        store.append(ARTIFACT, 101, CONTENT[101:])
    assert store.received(ARTIFACT) == 100


def test_an_upload_that_ends_early_is_kept_and_can_go_on(store: ArtifactStore) -> None:
    store.append(ARTIFACT, 0, CONTENT[:100])
    with pytest.raises(ArtifactError, match="ended after 100 of 1024 bytes"):
        store.finish(ARTIFACT)
    assert store.received(ARTIFACT) == 100
    store.append(ARTIFACT, 100, CONTENT[100:])
    store.finish(ARTIFACT)
    assert held(store) == CONTENT


def test_an_upload_longer_than_announced_is_refused(store: ArtifactStore) -> None:
    store.append(ARTIFACT, 0, CONTENT[:1000])
    with pytest.raises(ArtifactError, match="longer than the 1024 bytes"):
        store.append(ARTIFACT, 1000, CONTENT[:25])
    assert store.received(ARTIFACT) == 1000


@pytest.mark.parametrize("size", [0, LARGEST + 1, 1 << 63])
def test_a_size_out_of_range_is_refused_before_anything_is_written(
    store: ArtifactStore, folder: Path, size: int
) -> None:
    artifact = Artifact(ARTIFACT.digest, size)
    for call in (store.received, store.finish, lambda it: store.append(it, 0, b"")):
        with pytest.raises(ArtifactError, match="beyond 1 to 1048576"):
            call(artifact)
    assert list(folder.iterdir()) == []


def test_wrong_bytes_are_deleted_and_can_be_sent_anew(store: ArtifactStore, folder: Path) -> None:
    store.append(ARTIFACT, 0, CONTENT[:-1] + b"?")
    with pytest.raises(ArtifactError, match="another digest"):
        store.finish(ARTIFACT)
    assert list(folder.iterdir()) == []
    upload(store)
    assert held(store) == CONTENT


def test_a_wrong_size_with_a_digest_that_is_here_harms_nothing(store: ArtifactStore) -> None:
    upload(store)
    shorter = Artifact(ARTIFACT.digest, 10)
    assert not store.has(shorter)
    assert store.received(shorter) == 0
    store.append(shorter, 0, CONTENT[:10])
    with pytest.raises(ArtifactError, match="another digest"):
        store.finish(shorter)
    assert held(store) == CONTENT


def test_a_complete_artifact_is_not_written_again(store: ArtifactStore, folder: Path) -> None:
    upload(store)
    store.append(ARTIFACT, 0, b"?" * ARTIFACT.size)
    store.finish(ARTIFACT)
    assert held(store) == CONTENT
    assert list(folder.iterdir()) == [store.path(ARTIFACT)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12))
def test_whatever_arrives_in_whatever_pieces_only_the_whole_counts(pieces: list[tuple[int, int]]) -> None:
    content = CONTENT[:40]
    artifact = reference(content)
    here = 0
    with TemporaryDirectory() as name:
        store = ArtifactStore(Path(name), largest_upload=LARGEST)
        for begin, length in pieces:
            chunk = content[begin : begin + length]
            if begin > here:
                with pytest.raises(ArtifactError):
                    store.append(artifact, begin, chunk)
            else:
                store.append(artifact, begin, chunk)
                here = max(here, begin + len(chunk))
            assert store.received(artifact) == here
        if here == len(content):
            store.finish(artifact)
        else:
            with pytest.raises(ArtifactError):
                store.finish(artifact)
        assert store.has(artifact) == (here == len(content))


@pytest.mark.parametrize(
    "digest", ["../evil", "../" * 20 + "evil", "/tmp/" + "a" * 59, "a" * 61 + "/..", "." * 64, "..", "", "\0" * 64]
)
def test_a_digest_that_leads_out_of_the_folder_is_refused_before_anything_is_written(
    store: ArtifactStore, folder: Path, tmp_path: Path, digest: str
) -> None:
    with pytest.raises(ArtifactError, match="digest"):
        store.append(Artifact.from_proto(pb.ArtifactRef(digest=digest, size=4)), 0, b"evil")
    assert [path for path in tmp_path.rglob("*") if path not in (folder, folder.parent)] == []


def test_many_may_upload_the_same_artifact_at_once(store: ArtifactStore, folder: Path) -> None:
    content = CONTENT * 64
    artifact = reference(content)
    senders = 8
    start = threading.Barrier(senders)

    def send(step: int) -> None:
        start.wait()
        while (offset := store.received(artifact)) < artifact.size:
            store.append(artifact, offset, content[offset : offset + step])
        store.finish(artifact)

    with ThreadPoolExecutor(senders) as pool:
        for sender in [pool.submit(send, 500 + 100 * number) for number in range(senders)]:
            sender.result()
    assert held(store, artifact, chunk_size=1 << 16) == content
    assert list(folder.iterdir()) == [store.path(artifact)]


def test_a_wrong_sender_of_the_same_digest_costs_the_others_time_only(store: ArtifactStore) -> None:
    store.append(ARTIFACT, 0, b"?" * 500)
    store.append(ARTIFACT, store.received(ARTIFACT), CONTENT[500:])
    with pytest.raises(ArtifactError, match="send them anew"):
        store.finish(ARTIFACT)
    assert store.received(ARTIFACT) == 0
    upload(store)
    assert held(store) == CONTENT


def test_an_upload_is_never_seen_missing_while_it_is_finished(store: ArtifactStore) -> None:
    over = threading.Event()
    contents = [CONTENT + bytes([number]) for number in range(200)]
    current = reference(contents[0])
    store.append(current, 0, contents[0])

    def watch() -> list[int]:
        short = []
        while not over.is_set():
            artifact = current
            if (received := store.received(artifact)) != artifact.size:
                short.append(received)
        return short

    with ThreadPoolExecutor(2) as pool:
        watchers = [pool.submit(watch) for _ in range(2)]
        try:
            for content in contents:
                artifact = reference(content)
                store.append(artifact, 0, content)
                current = artifact
                store.finish(artifact)
        finally:
            over.set()
        assert [watcher.result() for watcher in watchers] == [[], []]


@pytest.mark.parametrize("chunk_size", [1, 100, 1024, 5000])
def test_an_artifact_is_read_from_any_offset_in_chunks(store: ArtifactStore, chunk_size: int) -> None:
    upload(store)
    for offset in (0, 1, 1000, 1023, 1024):
        chunks = list(store.open_chunks(ARTIFACT, offset, chunk_size))
        assert b"".join(chunks) == CONTENT[offset:]
        assert all(len(chunk) == chunk_size for chunk in chunks[:-1])


@pytest.mark.parametrize("offset", [1025, (1 << 64) - 1])
def test_an_offset_beyond_the_artifact_is_refused(store: ArtifactStore, offset: int) -> None:
    upload(store)
    with pytest.raises(ArtifactError, match=f"byte {offset} of 1024"):
        held(store, offset=offset)


def test_a_scratch_file_is_adopted_by_its_digest(store: ArtifactStore, folder: Path) -> None:
    scratch = store.scratch("aggregate")
    scratch.write_bytes(CONTENT)
    assert not store.has(ARTIFACT)
    store.adopt(scratch, ARTIFACT)
    assert held(store) == CONTENT
    assert list(folder.iterdir()) == [store.path(ARTIFACT)]


def test_what_is_deleted_is_gone_with_its_part_and_may_be_deleted_again(store: ArtifactStore, folder: Path) -> None:
    other = reference(b"other")
    upload(store)
    store.append(other, 0, b"oth")
    for artifact in (ARTIFACT, other, ARTIFACT):
        store.delete(artifact)
    assert list(folder.iterdir()) == []
    assert store.received(other) == 0


def test_a_sweep_keeps_what_is_named_and_uploads_that_have_not_ended(store: ArtifactStore) -> None:
    kept, swept = upload(store, b"kept"), upload(store, b"swept")
    store.append(ARTIFACT, 0, CONTENT[:300])
    for name in ("aggregate", "initial"):
        store.scratch(name).write_bytes(b"forgotten")
    store.sweep({kept.digest})
    assert (store.has(kept), store.has(swept)) == (True, False)
    assert store.received(ARTIFACT) == 300
    assert not any(store.scratch(name).exists() for name in ("aggregate", "initial"))


def test_a_full_disk_is_a_named_error_that_says_what_to_do(store: ArtifactStore, folder: Path) -> None:
    (folder / f"{ARTIFACT.digest}.part").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="the disk is full; make room there"):
        store.append(ARTIFACT, 0, CONTENT)


def test_a_folder_that_cannot_be_made_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match="cannot use the artifact folder"):
        ArtifactStore(tmp_path / "file" / "artifacts", largest_upload=LARGEST)
