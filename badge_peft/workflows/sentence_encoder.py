"""What a sentence encoder pools, as sentence-transformers writes it beside the weights.

Such a checkpoint has no head that exits could follow, and the transformers model that is loaded from it knows nothing
of its pooling. Exits that read the first token of an encoder trained on the mean of all tokens stay at chance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

FILE = "1_Pooling/config.json"
_KINDS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_FLAG = "pooling_mode_"  # before version 6 there was one flag for each way, now there is one name or a list of them


def own_pooling(model: str) -> str | None:
    """`cls`, `mean` or `last`: what the encoder's sentence embedding reads.

    Args:
        model: Folder or Hub repository.

    Returns:
        None where nothing says so, or exits cannot read the same.
    """
    config = _read(model)
    modes = config.get("pooling_mode")
    if modes is None:
        names = [key[len(_FLAG) :] for key, value in config.items() if key.startswith(_FLAG) and value is True]
        modes = [name.removesuffix("_token").removesuffix("_tokens") for name in names]
    modes = [modes] if isinstance(modes, str) else modes
    only = modes[0] if isinstance(modes, list) and len(modes) == 1 else None
    return _KINDS.get(only) if isinstance(only, str) else None


def _read(model: str) -> dict[str, Any]:
    try:
        path = Path(model, FILE) if Path(model).is_dir() else Path(hf_hub_download(model, FILE))
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, HfHubHTTPError, EntryNotFoundError):  # mostly no such file; none is worth a failure
        return {}
    return found if isinstance(found, dict) else {}
