"""TensorBoard's event files, in the folder `tensorboard` of the run folder; written without torch or TensorFlow."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from fedhds_server.observers.tracker import Tracker


class TensorBoard(Tracker):
    """One scalar for each name and round. A file is read before it is added to, so no step comes twice."""

    package = "tensorboard"
    _writer: Any = None

    def open(self, parameters: Mapping[str, str]) -> None:
        """Reads what earlier processes wrote; parameters go in as a table, once."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = self.context.folder / "tensorboard" / self.run_id
        folder.mkdir(parents=True, exist_ok=True)
        self._known = {(value.tag, event.step) for event in _events(folder) for value in event.summary.value}
        # Errors of writing come with flush: the queue's own thread keeps them.
        self._writer = EventFileWriter(str(folder))
        if ("parameters", 0) not in self._known:
            rows = "\n".join(f"| {name} | {value} |" for name, value in parameters.items())
            self._add("parameters", 0, _text(f"| setting | value |\n| --- | --- |\n{rows}"))

    def write(self, round_number: int, scalars: Mapping[str, float]) -> None:
        """Durable when it returns."""
        for name, value in scalars.items():
            if (name, round_number) not in self._known:
                self._add(name, round_number, {"simple_value": value})
        self._writer.flush()

    def closed(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            self._writer.close()

    def _add(self, tag: str, step: int, content: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, **content)])
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._known.add((tag, step))


def _text(words: str) -> dict[str, Any]:
    """A text as TensorBoard's plug-in for texts has it."""
    from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    # 7 is the type of strings.
    tensor = TensorProto(dtype=7, string_val=[words.encode()], tensor_shape=shape)
    return {
        "tensor": tensor,
        "metadata": SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text")),
    }


def _events(folder: Any) -> Iterator[Any]:
    """What is in the folder's files; a record that a crash cut short ends its file."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for file in sorted(folder.glob("events.out.tfevents.*")):
        yield from LegacyEventFileLoader(str(file)).Load()
