"""Plain torch in two processes: DDP, FSDP2, GradScaler.

Started by test_torch.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ranks import Checks, run_checks
from torch.distributed._composable.replicate import replicate
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from fused_sched import FusedScheduledAdam, schedules

CHECKS = Checks()

RATE = schedules.linear(0.05, 0.0, 20)
#: Of weights below 1: two orders of the same float32 operations.
TOLERANCE = 1e-6

#: Of optimizer state in torch.distributed.checkpoint.
FORMS = {
    "nested": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
}


def model() -> torch.nn.Sequential:
    """Its last layers have fewer rows than there are ranks: uneven and empty shards."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3), torch.nn.Linear(3, 1))


def sharded(policy: MixedPrecisionPolicy | None = None) -> torch.nn.Module:
    module = model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options = {} if policy is None else {"mp_policy": policy}
    for layer in module:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(module, mesh=mesh, **options)


def batch(step: int) -> torch.Tensor:
    """The same global batch in every number of processes."""
    everything = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    return everything[dist.get_rank() :: dist.get_world_size()]


def ours(params: Any, **options: Any) -> FusedScheduledAdam:
    return FusedScheduledAdam(params, lr=RATE, weight_decay=0.1, **options)


class Theirs:
    """torch's AdamW and LambdaLR as one."""

    def __init__(self, params: Any) -> None:
        self.optimizer = torch.optim.AdamW(params, lr=0.05, weight_decay=0.1)
        self.scheduler = LambdaLR(self.optimizer, lambda step: RATE(step) / 0.05)

    def step(self) -> None:
        self.optimizer.step()
        self.scheduler.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


def train(module: torch.nn.Module, optimizer: Any, steps: range, clip: bool = False) -> None:
    for step in steps:
        module(batch(step)).pow(2).mean().backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [whole(p) for p in module.parameters()]


def assert_close(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for actual, expected in zip(weights(a), weights(b), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def assert_same_bits(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b), (a - b).abs().max()


def compare(build: Callable[[], torch.nn.Module], clip: bool = False) -> FusedScheduledAdam:
    module, reference = build(), build()
    optimizer = ours(module.parameters())
    train(module, optimizer, range(8), clip)
    train(reference, Theirs(reference.parameters()), range(8), clip)
    assert_close(module, reference)
    assert optimizer.clock == 8
    assert optimizer.last_lr() == optimizer.scheduler().get_last_lr() == [RATE(7)]
    return optimizer


@CHECKS
def fsdp2_with_uneven_and_empty_shards() -> None:
    optimizer = compare(sharded)
    sizes = [0]
    for p, state in optimizer.state.items():
        assert isinstance(state["exp_avg"], DTensor)
        assert state["exp_avg"].placements == p.placements
        assert state["exp_avg"].shape == p.shape
        assert not isinstance(state["step"], DTensor)
        assert state["step"].item() == 8
        sizes.append(p.to_local().numel())
    assert dist.get_rank() == 0 or 0 in sizes[1:], "no shard is empty"


@CHECKS
def fsdp2_with_clipping() -> None:
    compare(sharded, clip=True)


@CHECKS
def fsdp2_with_clipping_in_the_step() -> None:
    """The norm is that of the whole gradient, not of this process's shards."""
    module, reference = sharded(), sharded()
    optimizer = ours(module.parameters(), max_grad_norm=0.01)
    theirs = Theirs(reference.parameters())
    for step in range(8):
        for each in (module, reference):
            each(batch(step)).pow(2).mean().backward()
        norm = whole(torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01))
        optimizer.step()
        theirs.step()
        # torch's is summed in float32, of gradients at weights that differ by TOLERANCE; a shard's is far off.
        torch.testing.assert_close(optimizer.grad_norm.float(), norm, rtol=10 * TOLERANCE, atol=0)
        for each in (optimizer, theirs):
            each.zero_grad()
    assert_close(module, reference)


@CHECKS
def a_norm_of_parameters_cut_differently_is_refused() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cut = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    copied = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Replicate()]))
    for p in (cut, copied):
        p.grad = torch.ones_like(p)
    assert "norm_reduce_hook" in raised(ours([cut, copied], max_grad_norm=1.0).step)
    ours([cut, copied]).step()


@CHECKS
def fsdp2_with_bfloat16_compute() -> None:
    compare(lambda: sharded(MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)))


@CHECKS
def fsdp2_parameters_of_bfloat16_have_exact_masters() -> None:
    """A master per shard: the weights are those of one process that keeps whole masters."""
    module, alone = sharded_bf16(), model().bfloat16()
    optimizer, single = ours(module.parameters(), master="fp32"), ours(alone.parameters(), master="fp32")
    for step in range(4):
        for p, q in zip(module.parameters(), alone.parameters(), strict=True):
            grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
            q.grad = grad
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements)
        optimizer.step()
        single.step()
    assert_same_bits(weights(module), weights(alone))
    for p, q in zip(module.parameters(), alone.parameters(), strict=True):
        assert torch.equal(whole(optimizer.state[p]["master"]), single.state[q]["master"])


def sharded_bf16() -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return fully_shard(model().bfloat16(), mesh=mesh)


@CHECKS
def fsdp2_keeps_every_format_through_distributed_checkpoints() -> None:
    """bfloat16 parameters whose master is a remainder, or whose moments are codes, which have no shards."""
    for form, options in FORMS.items():
        for formats in ({"master": "split16"}, {"master": "split8", "moments": "bf16"}, {"moments": "8bit"}):
            module = sharded_bf16()
            optimizer = ours(module.parameters(), **formats)
            train_bf16(module, optimizer, range(2))
            saved = copy.deepcopy(get_optimizer_state_dict(module, optimizer, options=options))
            other = sharded_bf16()
            other.load_state_dict(copy.deepcopy(module.state_dict()))
            resumed = ours(other.parameters(), **formats)
            if form == "flattened" and formats.get("moments") == "8bit":
                # torch looks in it for the live keys, which are codes, and it has moments.
                assert "nested form" in raised(
                    lambda a=(other, resumed, saved), o=options: set_optimizer_state_dict(*a, options=o)
                )
                continue
            set_optimizer_state_dict(other, resumed, saved, options=options)
            for run in ((module, optimizer), (other, resumed)):
                train_bf16(*run, range(2, 4))
            assert_same_bits(weights(other), weights(module))


def train_bf16(module: torch.nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        module(batch(step).bfloat16()).float().pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@CHECKS
def fsdp2_resumes_bit_for_bit_from_its_own_state_dict() -> None:
    module = sharded()
    optimizer = ours(module.parameters())
    train(module, optimizer, range(4))
    saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(module.state_dict())
    train(module, optimizer, range(4, 8))
    other = sharded()
    other.load_state_dict(saved[1])
    resumed = ours(other.parameters())
    resumed.load_state_dict(saved[0])
    assert resumed.clock == 4
    train(other, resumed, range(4, 8))
    assert_same_bits(weights(other), weights(module))


@CHECKS
def gradients_placed_otherwise_are_brought_to_the_shard() -> None:
    mesh = init_device_mesh("cpu", (2,))
    start = torch.arange(6.0).reshape(3, 2)
    p = torch.nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
    q = torch.nn.Parameter(start.clone())
    optimizer, single = ours([p]), ours([q])
    for _ in range(2):
        q.grad = torch.ones(3, 2)
        p.grad = distribute_tensor(torch.ones(3, 2), mesh, [Replicate()])
        optimizer.step()
        single.step()
    assert_same_bits([whole(p)], [q.detach()])


@CHECKS
def whole_state_for_a_shard_is_refused() -> None:
    module = sharded()
    optimizer, single = ours(module.parameters()), ours(model().parameters())
    saved = single.state_dict()
    for p, number in zip(single.param_groups[0]["params"], saved["param_groups"][0]["params"], strict=True):
        saved["state"][number] = {"step": 3.0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    assert "full_state_dict" in raised(lambda: optimizer.load_state_dict(saved))


def raised(action: Callable[[], Any]) -> str:
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return str(error)
    raise AssertionError("nothing was raised")


@CHECKS
def data_parallel() -> None:
    compare(lambda: DistributedDataParallel(model()))
    compare(lambda: replicate(model()))


@CHECKS
def data_parallel_accumulating_without_sync() -> None:
    module, reference = DistributedDataParallel(model()), DistributedDataParallel(model())
    optimizer, theirs = ours(module.parameters(), grad_divisor=2.0), Theirs(reference.parameters())
    for step in range(4):
        for wrapped, stepped, divisor in ((module, optimizer, 1.0), (reference, theirs, 2.0)):
            with wrapped.no_sync():
                (wrapped(batch(2 * step)).pow(2).mean() / divisor).backward()
            (wrapped(batch(2 * step + 1)).pow(2).mean() / divisor).backward()
            stepped.step()
            stepped.zero_grad()
    assert_close(module, reference)
    assert optimizer.clock == 4


class Alternating(torch.nn.Module):
    """Uses one of two branches: half of its parameters have no gradient in a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.left, self.right = (torch.nn.Linear(6, n) for n in (6, 1, 1))
        self.turn = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.turn += 1
        branch = self.left if self.turn % 2 else self.right
        return branch(self.trunk(inputs))


@CHECKS
def data_parallel_with_unused_parameters() -> None:
    optimizer = compare(lambda: DistributedDataParallel(Alternating(), find_unused_parameters=True))
    assert sorted(int(state["step"]) for state in optimizer.state.values()) == [4, 4, 4, 4, 8, 8]


@CHECKS
def gradient_scaler_skips_on_every_rank() -> None:
    for build in (lambda: DistributedDataParallel(model()), sharded):
        module = build()
        optimizer = ours(module.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        before = None
        for step in range(6):
            loss = module(batch(step)).pow(2).mean()
            # Infinite on one rank only: the others learn of it through the gradients, or FSDP2's found_inf.
            overflows = step == 2
            scaler.scale(loss * float("inf") if overflows and dist.get_rank() == 1 else loss).backward()
            before = weights(module)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if overflows:
                assert_same_bits(weights(module), before)
            assert optimizer.clock == step + (step < 2)
        assert optimizer.last_lr() == [RATE(4)]


if __name__ == "__main__":
    run_checks(CHECKS)
