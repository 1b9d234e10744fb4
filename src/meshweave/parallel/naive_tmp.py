import torch
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.nn import functional
from transformers import AttentionInterface


class Naive:
    def __init__(self, grid, part):
        self.held = [torch.cat([torch.arange(a, b) for a, b in columns.tolist()]) for columns in grid.parts]
        order = torch.cat(self.held)
        self.inverse = torch.argsort(order)
        doc = torch.full((grid.length,), -1)
        for n, (_, a, b) in enumerate(grid.places):
            doc[a:b] = n
        pos = torch.arange(grid.length)
        q = self.held[part.cp]
        self.mask = (doc[q][:, None] == doc[None]) & (pos[None] <= q[:, None])
        self.q, self.pos = q, pos
        self.group = part.cp_groups[0] if part.cp_groups else None


def attention(module, query, key, value, mask, dropout=0.0, scaling=None, sequence=None, sliding_window=None, **_):
    if sequence.group is not None:
        key = all_gather_tensor_autograd(key.contiguous(), 2, sequence.group).index_select(2, sequence.inverse)
        value = all_gather_tensor_autograd(value.contiguous(), 2, sequence.group).index_select(2, sequence.inverse)
    m = sequence.mask
    if sliding_window:
        m = m & (sequence.q[:, None] - sequence.pos[None] < sliding_window)
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=m, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("meshweave", attention)
