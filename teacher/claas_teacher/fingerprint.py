"""One word that tells whether two tokenizers give the same ids the same meaning; standard library only.

The teacher publishes it, the worker compares it with its student's: token ids may cross between them only when it is
equal. It covers the vocabulary, the merges (or scores) and the added tokens. It leaves out what changes no id's meaning
and may differ between two loadings of one tokenizer: chat template, padding, truncation, post-processor, flags of added
tokens.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any


def fingerprint(tokenizer: Any) -> str:
    """The fingerprint of a fast Hugging Face tokenizer (anything with `backend_tokenizer`), 64 hex digits.

    Raises:
        TypeError: a slow tokenizer, which does not show its merges.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(f"{type(tokenizer).__name__} is no fast tokenizer: its folder needs a tokenizer.json")
    state = json.loads(backend.to_str())
    model = state["model"]
    vocabulary = model["vocab"]
    content = {
        "vocabulary": sorted(vocabulary.items(), key=lambda item: item[1])
        if isinstance(vocabulary, dict)
        else vocabulary,
        # Older versions of the library write a merge as "a b", newer ones as ["a", "b"].
        "merges": [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", [])],
        "added": sorted([token["id"], token["content"]] for token in state["added_tokens"]),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
