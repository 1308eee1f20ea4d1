"""Work on one piece of memory, in order over CUDA streams."""

from __future__ import annotations

import torch

from symmpatterns import compat


class StreamOrder:
    """Remembers the stream that last worked on something, so that the next one waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device  # a CUDA device with its index
        self._raw: int | None = None  # asking for it costs a tenth of asking for the Stream
        self._stream: torch.cuda.Stream | None = None

    def follow(self) -> None:
        """The current stream is the next one. A capturing stream cannot wait for work outside of the capture."""
        raw = compat.current_raw_stream(self._device.index)
        if raw == self._raw:
            return
        stream = torch.cuda.current_stream(self._device)
        if self._stream is not None and not torch.cuda.is_current_stream_capturing():
            stream.wait_stream(self._stream)
        self._stream, self._raw = stream, raw
