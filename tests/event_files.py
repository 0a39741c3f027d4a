"""Reads TensorBoard's event files back: records of a length, a checksum, the event and its checksum (TFRecord)."""

from __future__ import annotations

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """(Tag, step) -> value of every scalar in a folder; of one that was written twice the later."""
    found: dict[tuple[str, int], float] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data, place = file.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            found |= {
                (one.tag, event.step): one.simple_value for one in event.summary.value if not one.HasField("tensor")
            }
            place += 16 + length
    return found
