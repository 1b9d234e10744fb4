#!/usr/bin/env bash
# One would guess: torch.distributed.checkpoint.state_dict.get_optimizer_state_dict only reads; called on a fresh optimizer, it returns
#   an empty or zero state, and training goes on as without it.
# What happens: it takes a step at learning rate 0 on zero gradients to create the state, and AdamW's step counter stays at 1. The first
#   real update then has the bias correction of a second step: it is about 0.74 of what it should be with betas (0.9, 0.95).
# Versions: torch 2.13.0 (CPU), numpy 2.4.6. Date: 2026-11-27.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
"$home/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$home/read.py" <<'PY'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

def first_update(read: bool) -> float:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    if read:
        state = get_optimizer_state_dict(model, optimizer)
        print("step counter after the read:", float(state["state"]["weight"]["step"]))
    model.weight.grad = torch.ones(1, 1)
    optimizer.step()
    return float(model.weight.detach())

print("torch", torch.__version__)
plain, read = first_update(False), first_update(True)
print(f"first update: {plain:.4f} without the read, {read:.4f} with it, ratio {read / plain:.3f}")
assert abs(plain + 1) < 1e-4 and 0.70 < read / plain < 0.78, "the behaviour has changed"
PY
"$home/venv/bin/python" "$home/read.py"
