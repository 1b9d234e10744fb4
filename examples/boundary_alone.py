"""How do I use the boundary in my own trainer? An encoder on a dp4 mesh feeds a language model on dp2 × tp2.

Run `python examples/boundary_alone.py` (starts 4 local processes) or `torchrun --nproc-per-node 4 …` with it.
"""

import os
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import start_processes

from meshweave.boundary import exchange, lane_ownership, plan_transfer

ITEM_TOKENS = [3, 5, 0, 2, 7, 1]  # media tokens of 6 images, in the order in which the samples use them


def train_step(rank: int) -> None:
    # Two meshes over the same 4 ranks. A lane is one data-parallel replica; its ranks hold the same tokens.
    encoder_mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    language_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    # Who encodes which image, and which images each language lane's samples have. Every rank knows all of it.
    encoder_lanes = [[4], [1], [0, 3, 5], [2]]
    source = lane_ownership(ITEM_TOKENS, encoder_lanes, encoder_mesh.mesh.unsqueeze(1).tolist())
    destination = lane_ownership(ITEM_TOKENS, [[0, 1, 2], [3, 4, 5]], language_mesh.mesh.tolist())
    plan = plan_transfer(source, destination)

    torch.manual_seed(0)  # the same weights and images everywhere; a trainer loads only its own images
    encoder = torch.nn.Linear(8, 16)
    head = torch.nn.Linear(16, 1).requires_grad_(False)
    images = [torch.randn(tokens, 8) for tokens in ITEM_TOKENS]

    # The step: encode this rank's images, exchange, use the media tokens, go back through the exchange.
    lane = encoder_mesh.get_local_rank("dp")
    encoded = encoder(torch.cat([images[item] for item in encoder_lanes[lane]]))
    (media,) = exchange([encoded], plan, rank)
    loss = head(media).square().sum()  # a sum over tokens: gradients add up over lanes, divide once at the end
    loss.backward()
    assert encoder.weight.grad is not None
    dist.all_reduce(encoder.weight.grad)

    alone = torch.nn.Linear(8, 16)  # the same step in one process
    alone.load_state_dict(encoder.state_dict())
    head(alone(torch.cat(images))).square().sum().backward()
    assert alone.weight.grad is not None
    error = (encoder.weight.grad - alone.weight.grad).abs().max() / alone.weight.grad.abs().max()
    if rank == 0:
        print(plan)
        print(f"worst gradient error against one process: {error:.1e}")
    if error > 1e-5:
        raise SystemExit(f"rank {rank}: gradients differ from the single process by {error:.1e}")


def main(rank: int, init_method: str = "env://") -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=4)
    train_step(rank)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun
        main(int(os.environ["RANK"]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            start_processes(main, (f"file://{folder}/store",), nprocs=4, start_method="fork")
