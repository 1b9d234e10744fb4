#!/usr/bin/env bash
# One would guess: torch.distributed.checkpoint saves any DTensor that distribute_tensor makes, so also the rank's slices of a fused
#   matrix (gate and up, or query, key and value in one), which transformers' tensor parallelism cuts with _StridedShard.
# What happens: full_tensor() of such a DTensor is right, but DCP describes a rank's part as one box from its first row on. The boxes of two
#   ranks overlap, and the save fails in the plan's validation, with a CheckpointException that `except Exception` does not catch.
# Versions: torch 2.13.0 (CPU). Date: 2026-11-28.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
"$home/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$home/save.py" <<'PY'
import sys, warnings
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp, torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

def outcome(tensor, folder):
    try:
        dcp.save({"weight": tensor}, checkpoint_id=folder)
    except Exception:
        return "an Exception"
    except BaseException as error:
        return f"{type(error).__name__}, which is no Exception"
    back = torch.zeros(tensor.shape)
    dcp.load({"weight": back}, checkpoint_id=folder)
    return "restored" if torch.equal(back, tensor.full_tensor()) else "restored wrongly"

def work(rank, folder):
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh, fused = init_device_mesh("cpu", (2,)), torch.arange(8.0)
    seen = {}
    for name, placement in {"Shard(0)": Shard(0), "_StridedShard(0, split_factor=2)": _StridedShard(0, split_factor=2)}.items():
        tensor = distribute_tensor(fused, mesh, [placement])
        assert torch.equal(tensor.full_tensor(), fused)
        seen[name] = outcome(tensor, f"{folder}/{len(seen)}")
        if rank == 0:
            print(f"{name}: rows {tensor.to_local().int().tolist()} on rank 0; DCP: {seen[name]}", flush=True)
        dist.barrier()
    assert list(seen.values()) == ["restored", "CheckpointException, which is no Exception"], "the behaviour has changed"
    dist.destroy_process_group()

if __name__ == "__main__":
    print("torch", torch.__version__, flush=True)
    mp.spawn(work, (sys.argv[1],), 2)
PY
OMP_NUM_THREADS=1 "$home/venv/bin/python" "$home/save.py" "$home" 2>&1 | grep -v "overlapping chunks"
