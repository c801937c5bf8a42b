"""Objects written into open files, with the system's errors as they were."""

from __future__ import annotations

from typing import IO, Any

import torch


def save_into(file: IO[bytes], data: Any) -> None:
    """``torch.save`` into an open file.

    Raises:
        OSError: If it cannot be written. torch would hide this one behind an error of its own about places in the file.

    """
    stream = _Stream(file)
    try:
        torch.save(data, stream)  # type: ignore[arg-type]
    except RuntimeError as error:
        if stream.failure is None:
            raise
        raise OSError(*stream.failure) from error


class _Stream:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        # No exception: it would hold on to the frames that it went through, and so to what was to be written.
        self.failure: tuple[Any, ...] | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = error.args
            raise

    def flush(self) -> None:
        self._file.flush()
