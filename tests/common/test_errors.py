"""Codes of errors: one per class, the same over the wire, each explained in docs/errors.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedhds import errors
from fedhds.errors import UNEXPECTED, DataError, FedhdsError, ModelError, StorageError, TaskError, code_of
from fedhds.grpc_errors import answers, error_of
from fedhds.v2 import federation_pb2 as pb

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "errors.md").read_text(encoding="utf-8")
CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FedhdsError)]
# What a coordinator raises in a call: no RPC can meet the others.
LOCAL = {errors.FedhdsError, errors.CoordinatorUnreachable}


def made(kind: type[FedhdsError]) -> FedhdsError:
    """An error of that class, whatever facts it takes."""
    error = kind.__new__(kind)
    Exception.__init__(error, "in two\nlines")
    return error


def test_every_class_has_a_code_of_its_own() -> None:
    codes = [vars(kind).get("code", "") for kind in CLASSES]
    assert all(re.fullmatch(r"FH\d\d", code) for code in codes)
    assert len({*codes, UNEXPECTED}) == len(codes) + 1
    assert code_of(ValueError()) == UNEXPECTED


def test_the_tree_and_the_page_name_exactly_these() -> None:
    known = {kind.__name__: kind.code for kind in CLASSES}
    assert dict(re.findall(r"(\w+) +(FH\d\d)", errors.__doc__ or "")) == known
    sections = re.findall(r"^## (FH\d\d)(?: (\w+))?$", PAGE, flags=re.MULTILINE)
    assert sections == [*sorted((code, name) for name, code in known.items()), (UNEXPECTED, "")]


def test_every_section_says_what_it_means_why_and_what_to_do() -> None:
    for section in PAGE.split("\n## ")[1:]:
        said = re.findall(r"^\*\*(.+?)\*\* \S.{20}", section, flags=re.MULTILINE)
        assert said == ["What it means.", "Likely causes.", "What to do."], section


def test_links_of_the_page_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)", PAGE)
    assert targets
    for target in targets:
        assert (DOCS / target).exists(), target


def test_the_public_message_has_no_word_of_a_library_or_of_a_row() -> None:
    library = ValueError("cannot  parse 'Mr Smith has diabetes'." + 400 * " more" + "\nin two lines")
    told = ModelError(f"the folder m holds no model ({str(library)[:300].rstrip(' .')}); download it again")
    told.__cause__ = library
    assert told.public_message == "the folder m holds no model (...); download it again"
    # Wrapped once more.
    again = TaskError(f"twice: {told}")
    again.__cause__ = told
    assert "Smith" not in again.public_message
    row = DataError("/home/smith/rows.jsonl", "the template refuses 'diabetes'", 7)
    assert row.public_message == "line 7 of its data cannot be used; the site's log has the details"
    assert TaskError("in two\nlines").public_message == "in two lines"


async def test_an_error_that_crosses_the_wire_keeps_class_and_code() -> None:
    class Raising:
        @answers
        async def call(self, request: bytes, context: Any) -> bytes:
            raise made(getattr(errors, request.decode()))

    server = grpc.aio.server()
    methods = {"Raise": grpc.unary_unary_rpc_method_handler(Raising().call)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for kind in CLASSES:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary("/test.Test/Raise")(kind.__name__.encode())
                error = error_of(caught.value)
                assert type(error) is (None.__class__ if kind in LOCAL else kind)
                assert error is None or str(error) == "in two lines"
    finally:
        await server.stop(None)


def test_a_public_message_can_travel_whatever_the_names_of_files_are() -> None:
    message = StorageError("cannot write to /data/caf\udce9").public_message
    assert message == r"cannot write to /data/caf\udce9"
    assert pb.FailTaskRequest(reason=message).SerializeToString()
