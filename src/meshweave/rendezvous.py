"""Which ranks of a launched world are of one generation? A restart finds in its launcher's store what the dead ranks left."""

import time
from uuid import uuid4

from torch.distributed import PrefixStore, Store

_HELLO, _ANSWERS, _CAME = "meshweave/hello", "meshweave/answer", "meshweave/came"
_POLL_SECONDS = 0.02


def meet(store: Store, rank: int, size: int, timeout_seconds: float) -> Store:
    """A part of the store that is new, and the same for all ranks that are there now. A collective over them.

    torchrun keeps one store through its restarts, where ranks would read the addresses of dead ones; and its count of restarts
    is each node's own. So rank 0 makes up a name, and answers with it whoever asks under a name that was never used before.

    Raises:
        RuntimeError: a rank did not come in time.
    """
    if rank:
        mine = uuid4().hex
        _append(store, _HELLO, f"{mine} ")
        generation = store.get(f"{_ANSWERS}/{mine}").decode()
        _append(store, f"{_CAME}/{generation}", f"{rank} ")
        return PrefixStore(generation, store)
    generation, answered = uuid4().hex, 0
    deadline = time.monotonic() + timeout_seconds
    # A key that is not there yet would be waited for.
    _append(store, _HELLO, " ")
    _append(store, f"{_CAME}/{generation}", " ")
    while len(came := set(store.get(f"{_CAME}/{generation}").split())) < size - 1:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{size - 1 - len(came)} of {size} ranks did not come: timed out")
        asked = store.get(_HELLO).decode().split()
        for name in asked[answered:]:
            store.set(f"{_ANSWERS}/{name}", generation)
        answered = len(asked)
        time.sleep(_POLL_SECONDS)
    return PrefixStore(generation, store)


def _append(store: Store, key: str, text: str) -> None:
    store.append(key, text)  # type: ignore[attr-defined]  # torch's stubs lack it
