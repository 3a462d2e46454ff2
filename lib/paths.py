"""Where things are. Knows folders; knows nothing of what is in them."""

import os
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
DATA = REPO / "data"
PROMPTS = DATA / "prompts"
MODELS = DATA / "models"


def cache_directory() -> Path:
    """The folder outside git for files that are made once: $MDLM_CACHE, else the user's own cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MDLM_CACHE") or Path(base) / "mdlm-steering")
