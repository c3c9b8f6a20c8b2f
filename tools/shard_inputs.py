"""What shards were made from: their plan and the content of their audio files, so that only a real change counts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from listen_dist.data.manifest import atomic_file, file_sha256, record_to_dict
from listen_dist.structures import Record

PLAN_NAME = "plan.json"
"""In the progress folder: how the whole set was cut, and by which options."""


@dataclass(frozen=True)
class InputFile:
    """An audio file as it was when a shard was made of it."""

    path: str
    size: int = 0
    mtime_ns: int = 0
    sha256: str = ""
    """Empty: the system didn't hand it out."""

    @classmethod
    def of(cls, path: str) -> InputFile:
        """The file as it is now."""
        try:
            state = os.stat(path)
            return cls(path, state.st_size, state.st_mtime_ns, file_sha256(Path(path)))
        except (OSError, ValueError):
            return cls(path)

    def has_changed(self, path: str) -> bool:
        """Whether the file, perhaps at another path or with another date, holds something else now.

        A file that is gone has not changed: its shard has what it held. One that was out of reach has changed once
        it is there.
        """
        try:
            state = os.stat(path)
            if not self.sha256:
                with open(path, "rb") as file:
                    file.read(1)
                return True
            if (path, state.st_size, state.st_mtime_ns) == (self.path, self.size, self.mtime_ns):
                return False
            return state.st_size != self.size or file_sha256(Path(path)) != self.sha256
        except (OSError, ValueError):
            return False


@dataclass(frozen=True)
class SetPlan:
    """How a set is cut into shards."""

    records: str
    """Hash over all records, their paths left out."""
    samples: int
    options: dict[str, Any]
    """All else that decides the bytes, by the names that a message gives."""
    counts: list[int]
    """Records of each shard."""

    @classmethod
    def load(cls, progress: Path) -> SetPlan | None:
        try:
            return cls(**json.loads((progress / PLAN_NAME).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, progress: Path) -> None:
        with atomic_file(progress / PLAN_NAME) as file:
            file.write(json.dumps(asdict(self)).encode())

    def difference(self, saved: SetPlan | None) -> str:
        """What another plan had otherwise, for a message."""
        if saved is None:
            return "they were written by an older version of this tool"
        keys = [key for key in self.options if self.options[key] != saved.options.get(key)]
        changes = [f"{key} was {saved.options.get(key)!s:.60}, is {self.options[key]!s:.60}" for key in keys]
        if self.records != saved.records:
            changes.append(f"the manifests changed ({saved.samples} records then, {self.samples} now)")
        return "; ".join(changes) or "a shard was replaced by another"


def rows_hash(records: Sequence[Record], *more: object) -> str:
    """Hash over records without their paths: where a file lies doesn't matter, what it holds is compared apart."""
    rows = [{**record_to_dict(record), "audio": len(record.audio)} for record in records]
    return hashlib.sha256(json.dumps([rows, *more]).encode()).hexdigest()
