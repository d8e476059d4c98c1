"""Artifacts, in a local folder and in S3: uploads that resume, count only when right, and survive each other."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhds.errors import ArtifactError, DamagedArtifact, StorageError
from fedhds.tensors.artifact import Artifact
from fedhds.v2 import transfer_pb2
from fedhds_server.storage import artifacts
from fedhds_server.storage.artifacts import ArtifactStore
from fedhds_server.storage.object_store import RemoteArtifacts
from tests.support.s3 import Bucket, s3_server

LARGEST = 1 << 20
CONTENT = bytes(range(256)) * 4


def reference(content: bytes) -> Artifact:
    return Artifact(hashlib.sha256(content).hexdigest(), len(content))


ARTIFACT = reference(CONTENT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "artifacts"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with s3_server(tmp_path_factory.mktemp("s3")) as bucket:
        yield bucket


@pytest.fixture
def bucket(server: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket, for this process too."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.empty()
    return server


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def opened(request: pytest.FixtureRequest, folder: Path) -> Callable[[Path], ArtifactStore]:
    """Opens the run's store with this folder: the store itself, or where what is in S3 is staged and copied to."""
    if request.param == "local":
        return lambda where: ArtifactStore(where, largest_upload=LARGEST)
    url = request.getfixturevalue("bucket").url
    return lambda where: RemoteArtifacts(url, where, "run-id", largest_upload=LARGEST)


@pytest.fixture
def store(opened: Callable[[Path], ArtifactStore], folder: Path) -> ArtifactStore:
    return opened(folder)


@pytest.mark.slow
def test_a_coordinator_elsewhere_finds_what_was_acknowledged_and_nothing_else(bucket: Bucket, tmp_path: Path) -> None:
    first, second = (RemoteArtifacts(bucket.url, tmp_path / name, "r", largest_upload=LARGEST) for name in "ab")
    upload(first)
    first.append(other := reference(b"other"), 0, b"oth")
    assert (second.has(ARTIFACT), second.received(ARTIFACT)) == (True, ARTIFACT.size)
    assert (second.has(other), second.received(other)) == (False, 0)
    assert content_of(second) == CONTENT
    assert content_of(second, offset=1000) == CONTENT[1000:]
    stranger = RemoteArtifacts(bucket.url, tmp_path / "c", "another-run", largest_upload=LARGEST)
    assert not stranger.has(ARTIFACT)
    second.delete(ARTIFACT)
    assert bucket.objects() == []
    # The first one's copy does not stand for it.
    assert first.received(ARTIFACT) == 0
    upload(first)
    assert bucket.objects() == [f"r/{ARTIFACT.digest}"]


@pytest.mark.slow
def test_an_upload_is_not_acknowledged_before_the_object_store_has_it(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RemoteArtifacts(bucket.url, tmp_path, "r", largest_upload=LARGEST)
    store.append(ARTIFACT, 0, CONTENT)
    bucket.remove()
    with pytest.raises(StorageError, match="there is no such bucket; make it"):
        store.finish(ARTIFACT)
    assert not store.has(ARTIFACT)
    assert store.received(ARTIFACT) == ARTIFACT.size
    bucket.make()
    store.finish(ARTIFACT)
    assert bucket.objects() == [f"r/{ARTIFACT.digest}"]
    assert content_of(store) == CONTENT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "cannot be reached"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}, "credentials"),
    ],
)
def test_an_object_store_that_cannot_be_used_is_a_named_error_without_secrets(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], words: str
) -> None:
    for name, value in changed.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    if words == "credentials":
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageError, match=words) as caught:
        RemoteArtifacts(bucket.url, tmp_path, "r", largest_upload=LARGEST)
    for secret in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert bucket.environment[secret] not in str(caught.value)


@pytest.mark.slow
def test_a_damaged_copy_of_an_object_is_fetched_anew_and_a_damaged_object_is_an_error(
    bucket: Bucket, tmp_path: Path
) -> None:
    store = RemoteArtifacts(bucket.url, tmp_path, "r", largest_upload=LARGEST)
    upload(store)
    for damage in (lambda path: path.write_bytes(CONTENT[::-1]), os.unlink):
        damage(store.path(ARTIFACT))
        assert content_of(store) == CONTENT
    for content in (CONTENT[::-1], CONTENT[:-1]):
        bucket.write(f"r/{ARTIFACT.digest}", content)
        store.path(ARTIFACT).unlink()
        with pytest.raises(DamagedArtifact, match=f"{bucket.url}/r/{ARTIFACT.digest} is damaged.*put a file"):
            content_of(store)
    bucket.write(f"r/{ARTIFACT.digest}", CONTENT)
    assert content_of(store) == CONTENT
    bucket.empty()
    store.path(ARTIFACT).unlink()
    with pytest.raises(DamagedArtifact, match="is gone"):
        content_of(store)


def content_of(store: ArtifactStore, artifact: Artifact = ARTIFACT, offset: int = 0, chunk_size: int = 100) -> bytes:
    return b"".join(store.open_chunks(artifact, offset, chunk_size))


def upload(store: ArtifactStore, content: bytes = CONTENT) -> Artifact:
    artifact = reference(content)
    store.append(artifact, 0, content)
    store.finish(artifact)
    return artifact


def test_nothing_is_held_of_an_artifact_that_nobody_sent(store: ArtifactStore) -> None:
    assert not store.has(ARTIFACT)
    assert store.received(ARTIFACT) == 0
    with pytest.raises(DamagedArtifact, match=f"{ARTIFACT.digest} is gone"):
        content_of(store)
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


def test_an_upload_goes_on_after_a_restart_where_it_stood(
    opened: Callable[[Path], ArtifactStore], folder: Path
) -> None:
    opened(folder).append(ARTIFACT, 0, CONTENT[:400])
    again = opened(folder)
    assert again.received(ARTIFACT) == 400
    again.append(ARTIFACT, 400, CONTENT[400:])
    again.finish(ARTIFACT)
    assert content_of(opened(folder)) == CONTENT


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
    assert content_of(store) == CONTENT


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
    assert content_of(store) == CONTENT


def test_a_wrong_size_with_a_digest_that_is_here_harms_nothing(store: ArtifactStore) -> None:
    upload(store)
    shorter = Artifact(ARTIFACT.digest, 10)
    assert not store.has(shorter)
    assert store.received(shorter) == 0
    store.append(shorter, 0, CONTENT[:10])
    with pytest.raises(ArtifactError, match="another digest"):
        store.finish(shorter)
    assert content_of(store) == CONTENT


def test_a_complete_artifact_is_not_written_again(store: ArtifactStore, folder: Path) -> None:
    upload(store)
    store.append(ARTIFACT, 0, b"?" * ARTIFACT.size)
    store.finish(ARTIFACT)
    assert content_of(store) == CONTENT
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


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.booleans()), max_size=12))
def test_an_upload_counts_only_if_what_lies_on_disk_has_the_digest(pieces: list[tuple[int, int, bool]]) -> None:
    """Also where bytes come again and differ: what was hashed when they came the first time is then worth nothing."""
    content, written = CONTENT[:40], bytearray()
    artifact = reference(content)
    with TemporaryDirectory() as name:
        store = ArtifactStore(Path(name), largest_upload=LARGEST)
        # The last piece completes what the others left, so that all depends on the digest.
        for begin, length, wrong in [*pieces, (40, 0, False)]:
            begin = min(begin, len(written))
            chunk = bytes(length and 40 - begin) if wrong else content[begin : begin + length] or content[begin:]
            store.append(artifact, begin, chunk)
            written[begin : begin + len(chunk)] = chunk
        if bytes(written) == content:
            store.finish(artifact)
            assert content_of(store, artifact) == content
        else:
            with pytest.raises(ArtifactError, match="another digest"):
                store.finish(artifact)
            assert not store.has(artifact)


def test_an_upload_of_which_this_process_saw_only_the_end_is_hashed_whole(folder: Path) -> None:
    ArtifactStore(folder, largest_upload=LARGEST).append(ARTIFACT, 0, b"?" * 400)
    again = ArtifactStore(folder, largest_upload=LARGEST)
    again.append(ARTIFACT, 400, CONTENT[400:])
    with pytest.raises(ArtifactError, match="another digest"):
        again.finish(ARTIFACT)


@pytest.mark.parametrize(
    "digest", ["../evil", "../" * 20 + "evil", "/tmp/" + "a" * 59, "a" * 61 + "/..", "." * 64, "..", "", "\0" * 64]
)
def test_a_digest_that_leads_out_of_the_folder_is_refused_before_anything_is_written(
    store: ArtifactStore, folder: Path, tmp_path: Path, digest: str
) -> None:
    with pytest.raises(ArtifactError, match="digest"):
        store.append(Artifact.from_proto(transfer_pb2.ArtifactRef(digest=digest, size=4)), 0, b"evil")
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
    assert content_of(store, artifact, chunk_size=1 << 16) == content
    assert list(folder.iterdir()) == [store.path(artifact)]


def test_a_wrong_sender_of_the_same_digest_costs_the_others_time_only(store: ArtifactStore) -> None:
    store.append(ARTIFACT, 0, b"?" * 500)
    store.append(ARTIFACT, store.received(ARTIFACT), CONTENT[500:])
    with pytest.raises(ArtifactError, match="send them again"):
        store.finish(ARTIFACT)
    assert store.received(ARTIFACT) == 0
    upload(store)
    assert content_of(store) == CONTENT


def test_an_upload_is_never_seen_missing_while_it_is_finished(store: ArtifactStore) -> None:
    over = threading.Event()
    contents = [CONTENT + bytes([number]) for number in range(100)]
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
        content_of(store, offset=offset)


def test_a_scratch_file_is_adopted_by_its_digest(store: ArtifactStore, folder: Path) -> None:
    scratch = store.scratch("aggregate")
    scratch.write_bytes(CONTENT)
    assert not store.has(ARTIFACT)
    store.adopt(scratch, ARTIFACT)
    assert content_of(store) == CONTENT
    assert list(folder.iterdir()) == [store.path(ARTIFACT)]


def test_what_is_deleted_is_gone_and_may_be_deleted_again(store: ArtifactStore, folder: Path) -> None:
    other = reference(b"other")
    upload(store)
    store.append(other, 0, b"oth")
    for artifact in (ARTIFACT, other, ARTIFACT):
        store.delete(artifact)
        store.delete_part(artifact)
    assert list(folder.iterdir()) == []
    assert store.received(other) == 0


def test_senders_of_the_same_bytes_do_not_touch_each_other(store: ArtifactStore) -> None:
    store.append(ARTIFACT, 0, b"?" * 400, "thief")
    store.append(ARTIFACT, 0, CONTENT[:300], "a")
    assert (store.received(ARTIFACT, "a"), store.received(ARTIFACT, "thief")) == (300, 400)
    store.append(ARTIFACT, 400, b"?" * 624, "thief")
    with pytest.raises(ArtifactError, match="another digest"):
        store.finish(ARTIFACT, "thief")
    store.append(ARTIFACT, 300, CONTENT[300:], "a")
    store.finish(ARTIFACT, "a")
    assert content_of(store) == CONTENT


def test_an_upload_waits_when_it_would_take_the_room_that_the_state_needs(
    store: ArtifactStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 1000 << 20
    block = os.statvfs_result((4096, 4096, free >> 11, free >> 12, free >> 12, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: block)
    store.check_room(900 << 20)
    with pytest.raises(StorageError, match="has 1000 MiB left, of which the run's state needs 100: an upload of 901"):
        store.check_room(901 << 20)


def test_a_sweep_keeps_what_is_named_or_young_and_uploads_that_have_not_ended(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, swept, published = upload(store, b"kept"), upload(store, b"swept"), upload(store, b"published")
    store.keep_update(published, 1, "a")
    store.append(ARTIFACT, 0, CONTENT[:300])
    for name in ("aggregate", "initial"):
        store.scratch(name).write_bytes(b"forgotten")
    store.append(ARTIFACT, 0, CONTENT[:200], "another")
    store.sweep({kept.digest}, {"", "another"})
    assert store.parts() == {"": ARTIFACT.digest, "another": ARTIFACT.digest}
    assert store.has(swept)
    monkeypatch.setattr(artifacts, "YOUNG_S", -10.0)
    store.sweep({kept.digest}, {""})
    assert store.received(ARTIFACT, "another") == 0
    assert [store.has(artifact) for artifact in (kept, swept, published)] == [True, False, False]
    assert store.received(ARTIFACT) == 300
    assert not any(store.scratch(name).exists() for name in ("aggregate", "initial"))
    assert kept_updates(store) == {"round-1/a.safetensors": b"published"}
    monkeypatch.undo()
    young = upload(store, b"young")
    store.sweep({kept.digest}, over=True)
    assert (store.has(kept), store.has(young)) == (True, False)
    assert store.received(ARTIFACT) == 0
    assert kept_updates(store) == {"round-1/a.safetensors": b"published"}


def kept_updates(store: ArtifactStore) -> dict[str, bytes]:
    """What people find, by name."""
    if isinstance(store, RemoteArtifacts):
        files, root = store._files, f"{store._root}/updates"
        return {path.removeprefix(f"{root}/"): files.cat_file(path) for path in files.find(root)}
    folder = store._folder / "updates"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_kept_updates_have_names_for_people_and_outlive_the_artifact(store: ArtifactStore) -> None:
    first, second = upload(store, b"first"), upload(store, b"second")
    sites = ["a", "hospital/ward 3", "..", "%2F", "ß" * 128]
    for _ in range(2):
        for site in sites:
            store.keep_update(first, 3, site)
    store.keep_update(second, 4, "a")
    for artifact in (first, second):
        store.delete(artifact)
    found = kept_updates(store)
    assert found.pop("round-4/a.safetensors") == b"second"
    assert set(found.values()) == {b"first"}
    assert {
        "round-3/a.safetensors",
        "round-3/hospital%2Fward 3.safetensors",
        "round-3/...safetensors",
        "round-3/%252F.safetensors",
    } < set(found)
    assert len(found) == len(sites)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_after_the_acknowledgement_is_never_read(store: ArtifactStore, damage: str) -> None:
    upload(store)
    store.verified(ARTIFACT)
    path = store.path(ARTIFACT)
    if isinstance(store, RemoteArtifacts):
        # Its copy is fetched again: only the object counts.
        store._files.rm_file(store._object(ARTIFACT))
    stat = path.stat()
    match damage:
        case "flip":
            with path.open("r+b") as file:
                file.seek(500)
                file.write(bytes([CONTENT[500] ^ 1]))
            # Not even a change that hides itself is trusted.
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            # The kernel's clock ticks every few milliseconds.
            while path.stat().st_ctime_ns == stat.st_ctime_ns:
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        case "truncate":
            os.truncate(path, 1000)
        case _:
            path.unlink()
    with pytest.raises(DamagedArtifact, match=r"(is damaged|is gone).*put a file of 1024 bytes"):
        store.verified(ARTIFACT)
    with pytest.raises(DamagedArtifact):
        content_of(store)
    # Deleted, it can be uploaded again.
    store.delete(ARTIFACT)
    assert content_of(store, upload(store)) == CONTENT


def test_damage_that_the_file_system_does_not_show_is_found_when_a_minute_has_passed(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(store)
    hashed: list[Path] = []
    of_file = Artifact.of_file

    def noted(path: Path) -> Artifact:
        hashed.append(path)
        return of_file(path)

    monkeypatch.setattr(Artifact, "of_file", noted)
    for _ in range(3):
        store.verified(ARTIFACT)
    assert hashed == []
    monkeypatch.setattr(artifacts, "_TRUSTED_S", 0.0)
    store.verified(ARTIFACT)
    assert hashed == [store.path(ARTIFACT)]


def test_a_full_disk_is_a_named_error_that_says_what_to_do(store: ArtifactStore, folder: Path) -> None:
    (folder / f"{ARTIFACT.digest}-.part").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="the disk is full; make room there"):
        store.append(ARTIFACT, 0, CONTENT)


def test_a_folder_that_cannot_be_made_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match="cannot use the artifact folder"):
        ArtifactStore(tmp_path / "file" / "artifacts", largest_upload=LARGEST)
