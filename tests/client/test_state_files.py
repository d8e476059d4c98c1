"""Names of files and folders in a site's state folder."""

from __future__ import annotations

from fedhds_client.state_files import file_key


def test_a_file_key_is_a_short_name_that_depends_on_the_text_alone() -> None:
    texts = ["hospital-a/ward", "hospital-a", "../../etc/passwd", "", "Größe", "x" * 10_000]
    keys = [file_key(text) for text in texts]
    assert keys == [file_key(text) for text in texts]
    assert len(set(keys)) == len(texts)
    assert all(key.isalnum() and len(key) == 24 for key in keys)
