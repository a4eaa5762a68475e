"""JSON of others: a text, whose errors are all ValueErrors (`parsed`), and a small file (`read_object`)."""

import json
from pathlib import Path
from typing import Any

from perflow_diffusers.weights.errors import WeightSourceError

_MAX_BYTES = 1 << 26  # an index of shards has about 100 bytes a tensor


def parsed(text: str | bytes) -> Any:
    """What `json.loads` says, with a ValueError for text that is nested too deep for it, too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; `what` says what the file should be.

    Raises `WeightSourceError` if it cannot be read, is larger than 64 MiB, or holds anything else.
    """
    try:
        size = path.stat().st_size
        content = parsed(path.read_bytes()) if size <= _MAX_BYTES else f"{size:,} bytes"
    except (OSError, ValueError) as error:
        raise WeightSourceError(f"{path} is not {what} ({error}). Download or write it again.") from error
    if not isinstance(content, dict):
        shown = content if size > _MAX_BYTES else f"a JSON {type(content).__name__}, not an object"
        raise WeightSourceError(f"{path} is not {what} (it is {shown}). Download or write it again.")
    return content
