#!/usr/bin/env bash
# One would guess: a tar shard that was cut off (a copy that broke) makes webdataset raise, wherever the cut lies.
# What happens: a cut between two members, or inside a member's header, ends the stream silently: the samples behind it are missing and
#   the epoch is shorter, without an error or a warning. Only a cut inside a member's data raises.
# Versions: webdataset 1.0.2. Date: 2026-11-27.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
"$home/venv/bin/pip" install --quiet --disable-pip-version-check webdataset==1.0.2 numpy==2.4.6
cat > "$home/read.py" <<'PY'
import io, sys, tarfile
from importlib.metadata import version
from pathlib import Path
import webdataset

home = Path(sys.argv[1])
whole = io.BytesIO()
with tarfile.open(fileobj=whole, mode="w", format=tarfile.USTAR_FORMAT) as shard:
    for number in range(8):
        content = b"x" * 1500  # three blocks of 512 bytes behind a header of one
        member = tarfile.TarInfo(f"{number:03d}.txt")
        member.size = len(content)
        shard.addfile(member, io.BytesIO(content))

def samples(cut: int) -> int | str:
    path = home / f"shard-{cut}.tar"
    path.write_bytes(whole.getvalue()[:cut])
    try:
        return sum(1 for _ in webdataset.WebDataset(str(path), shardshuffle=False))
    except Exception as error:
        return type(error).__name__

member = 4 * 512
found = {"whole": samples(len(whole.getvalue())), "between members 4 and 5": samples(4 * member),
         "inside the header of member 5": samples(4 * member + 100), "inside the data of member 5": samples(4 * member + 700)}
print("webdataset", version("webdataset"))
for where, result in found.items():
    print(f"cut {where}: {result} of 8 samples" if isinstance(result, int) else f"cut {where}: raises {result}")
assert list(found.values())[:3] == [8, 4, 4] and isinstance(found["inside the data of member 5"], str), "the behaviour has changed"
PY
"$home/venv/bin/python" "$home/read.py" "$home"
