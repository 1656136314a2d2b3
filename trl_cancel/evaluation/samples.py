"""The file of all answers, written as they come, from which an interrupted evaluation goes on."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..running.secrets import without_secrets
from ..texts import plain, write_text


Sample = dict[str, Any]


def key_of(sample: Sample) -> tuple[int, int | None]:
    """What tells a sample from the others: its problem and its number, `None` for the greedy one."""
    return sample["problem"], sample["sample"]


class SampleLog:
    """
    `samples.jsonl` in a folder, one answer a line, with the `settings.json` that made them.

    Args:
        folder (`Path`):
            The folder.
        settings (`dict`):
            Everything that the answers and their rewards depend on.

    Attributes:
        samples (`list[dict]`):
            What an earlier run has left.

    Raises:
        `ValueError`: If the folder holds samples that were made with other settings, or a file of it is damaged.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.path = folder / "samples.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._check(folder / "settings.json", without_secrets(json.loads(json.dumps(settings))))
        self.samples = self._read()

    def append(self, samples: Iterable[Sample]) -> None:
        """Writes samples."""
        text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)

    def _check(self, path: Path, settings: dict[str, Any]) -> None:
        if not self.path.exists() or not self.path.stat().st_size:  # settings without samples bind nobody
            write_text(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        elif path.exists():
            found = without_secrets(_settings_in(path))
            for name in {**settings, **found}:
                if found.get(name) != settings.get(name):
                    raise ValueError(
                        f"{plain(self.path.parent)} holds samples of an evaluation with {name}={found.get(name)!r}, and this "
                        f"one has {name}={settings.get(name)!r}. Use the same setting, or another output folder."
                    )
        else:
            raise ValueError(f"{plain(self.path)} has no settings.json beside it; use another output folder.")

    def _read(self) -> list[Sample]:
        """What is there, without a last line that was cut off in the middle."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
        # By line feeds alone: JSON leaves other ends of lines, U+2028 for one, as they are in texts.
        return [self._parse(line, number) for number, line in enumerate(whole.split(b"\n"), 1) if line]

    def _parse(self, line: bytes, number: int) -> Sample:
        try:
            sample = json.loads(line.decode("utf-8"))
            key_of(sample)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{plain(self.path)}, line {number}: this is no sample ({type(error).__name__}: {error}). Remove the line, "
                "and its answer is made once more; or use another output folder."
            ) from error
        return sample


def _settings_in(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"it holds a {type(found).__name__}")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{plain(path)}: these are no settings ({type(error).__name__}: {error}), so nobody knows how the samples beside "
            "it were made. Put the file back, or use another output folder."
        ) from error
    return found
