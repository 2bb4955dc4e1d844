"""What two ranks of a process group do with every public Module; test_parallel.py runs it in processes of its own."""

import copy
import datetime as dt

import modules
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

RANKS = 2
NOT_FSDP = {"FusedEmbeddingLookup rowwise_adagrad auto"}  # its weights train themselves: what FSDP gathers is not kept


def output_and_gradients(model, inputs):
    out = modules.run(model, inputs)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    (out * weights).sum().backward()
    return out.detach()


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def outcomes(entry, mesh):
    """Of DDP and FSDP2: this rank's output beside that of the Module alone, gradients beside the mean over ranks."""
    torch.manual_seed(0)
    alone = entry.build("cpu", torch.float32)
    torch.manual_seed(1 + dist.get_rank())
    inputs = entry.inputs()
    wrapped = {"ddp": copy.deepcopy(alone)}
    if entry.name not in NOT_FSDP:
        wrapped["fsdp"] = fully_shard(copy.deepcopy(alone), mesh=mesh)
    want = output_and_gradients(alone, inputs)
    wants = {key: parameter.grad for key, parameter in alone.named_parameters() if parameter.requires_grad}
    for gradient in wants.values():
        dist.all_reduce(gradient)
        gradient /= RANKS
    for name, module in wrapped.items():
        out = output_and_gradients(DistributedDataParallel(module) if name == "ddp" else module, inputs)
        gradients = {key: full(parameter.grad) for key, parameter in module.named_parameters() if key in wants}
        yield name, {"output": (out, want), **{key: (gradients[key], wants[key]) for key in wants}}


def run(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=dt.timedelta(seconds=100))
    mesh = init_device_mesh("cpu", (RANKS,))
    results = {
        entry.name: dict(outcomes(entry, mesh))
        for entry in modules.ENTRIES
        if list(entry.build("meta", torch.float32).parameters())
    }
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()
