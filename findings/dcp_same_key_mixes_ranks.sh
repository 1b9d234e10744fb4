#!/usr/bin/env bash
# One would guess: when ranks save different values under the same keys with torch.distributed.checkpoint, saving fails, or every key
#   holds rank 0's value (plain tensors and objects count as replicated, so any one rank's set is consistent in itself).
# What happens: neither. Duplicates are dropped key by key and the keys that are left are spread over the ranks, so one checkpoint holds
#   some values of one rank and some of another, without a word.
# Versions: torch 2.13.0 (CPU, gloo, 2 ranks), numpy 2.4.6. Date: 2026-11-27.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
"$home/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$home/save.py" <<'PY'
import os, sys
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp

dist.init_process_group("gloo")
rank, folder = dist.get_rank(), sys.argv[1]
keys = [f"key{number}" for number in range(8)]
dcp.save({key: torch.full((4,), float(rank)) for key in keys}, checkpoint_id=folder)
if rank == 0:
    print("torch", torch.__version__)
read = {key: torch.full((4,), -1.0) for key in keys}
dcp.load(read, checkpoint_id=folder)
if rank == 0:
    held = {key: int(value[0]) for key, value in read.items()}
    print("rank whose value each key holds:", held)
    print("mixed" if set(held.values()) == {0, 1} else "not mixed")
    open(sys.argv[2], "w").write("mixed" if set(held.values()) == {0, 1} else "not mixed")
dist.barrier()
dist.destroy_process_group()
PY
OMP_NUM_THREADS=1 "$home/venv/bin/torchrun" --standalone --nproc-per-node 2 "$home/save.py" "$home/checkpoint" "$home/verdict"
test "$(cat "$home/verdict")" = mixed
