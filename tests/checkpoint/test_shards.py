"""A safetensors file written one tensor at a time is read like any other."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from meshweave.checkpoint.shards import DTYPES, Entry, write_shard


def raw(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def test_tensors_of_any_dtype_come_in_any_order_and_lie_where_readers_want_them(tmp_path: Path) -> None:
    tensors = {name: torch.arange(3).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"none": torch.empty(0, 2), "one": torch.tensor(1.5), "turned": torch.rand(2, 3, 4).transpose(1, 2)}
    entries = [Entry(key, value.dtype, tuple(value.shape)) for key, value in sorted(tensors.items(), reverse=True)]
    write_shard(tmp_path / "file", entries, tensors.items())
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for key, value in tensors.items():
        assert found[key].dtype == value.dtype and found[key].shape == value.shape
        assert raw(found[key]).equal(raw(value)), key
    data = (tmp_path / "file").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header.pop("__metadata__") == {"format": "pt"}
    for key, value in header.items():
        assert value["data_offsets"][0] % tensors[key].dtype.itemsize == 0, key


def test_a_tensor_that_does_not_come_or_is_another_is_no_file_to_keep(tmp_path: Path) -> None:
    entries = [Entry("a", torch.float32, (2,)), Entry("b", torch.float32, (2,))]
    with pytest.raises(ValueError, match="no tensor came for b"):
        write_shard(tmp_path / "file", entries, [("a", torch.ones(2))])
    with pytest.raises(ValueError, match=r"a has shape \(2, 1\), not \(2,\)"):
        write_shard(tmp_path / "file", entries, [("a", torch.ones(2, 1))])
