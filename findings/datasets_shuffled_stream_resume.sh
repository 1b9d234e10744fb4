#!/usr/bin/env bash
# One would guess: an IterableDataset that is shuffled with a buffer resumes from its own state_dict() where it stopped: over both parts
#   of the epoch every sample is seen once.
# What happens: it warns that the buffer was not saved and will be refilled, which costs the samples that lay in it; but others come
#   twice as well, and near the end of an epoch nothing comes at all. Stopped early in an epoch it looks exact.
# Versions: datasets 5.2.0, pyarrow 26.0.1, numpy 2.4.6. Date: 2026-11-27.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
"$home/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 numpy==2.4.6
cat > "$home/resume.py" <<'PY'
import itertools, logging
import datasets

logging.disable(logging.WARNING)
SAMPLES, BUFFER = 240, 40

def stream():
    table = datasets.Dataset.from_dict({"number": list(range(SAMPLES))})
    return table.to_iterable_dataset(num_shards=4).shuffle(seed=3, buffer_size=BUFFER)

def resumed(stop: int) -> tuple[int, int]:
    """Samples never seen and seen twice when an epoch is left after `stop` samples and resumed."""
    first = stream()
    seen = [row["number"] for row in itertools.islice(first, stop)]
    state = first.state_dict()
    second = stream()
    second.load_state_dict(state)
    seen += [row["number"] for row in second]
    return SAMPLES - len(set(seen)), len(seen) - len(set(seen))

print("datasets", datasets.__version__)
found = {stop: resumed(stop) for stop in (10, 120, 200, 230)}
for stop, (lost, twice) in found.items():
    print(f"stopped after {stop:3} of {SAMPLES}: {lost} samples never seen, {twice} seen twice")
assert any(lost for lost, _ in found.values()), "the behaviour has changed"
PY
HF_HUB_OFFLINE=1 "$home/venv/bin/python" "$home/resume.py"
