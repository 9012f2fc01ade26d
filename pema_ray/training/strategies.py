"""How training processes share the work: plain DDP, accelerate or DeepSpeed, behind one small protocol. Knows no Ray.

Whichever is chosen, gradients are averaged over processes, and parameters are float32. The optimiser's state that a
checkpoint needs comes out, and goes in, by parameter name, whatever the optimiser: `<parameter>.<entry>`, so that any
strategy takes up what another left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from pema_ray.errors import UserError
from pema_ray.training.optimizer_state import by_name, counted, entries, foreign

StrategyName = Literal["ddp", "accelerate", "deepspeed"]
MakeOptimizer = Callable[[Sequence[tuple[str, nn.Parameter]]], Optimizer]
"""Makes an optimiser of named parameters; it may sort them into groups (weight decay) by their names."""


@dataclass(frozen=True)
class Place:
    """This process's rank among the training processes, whose `torch.distributed` group is initialised."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def broadcast(self, values: Tensor) -> Tensor:
        """Replace by the leading process's values: a rounding difference must not stop some workers and not others."""
        if self.world > 1:
            torch.distributed.broadcast(values, src=0)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            torch.distributed.barrier()


class Strategy(Protocol):
    """A module wrapped for all processes, with its optimiser."""

    def learn(self, inputs: tuple[Any, ...], last: bool) -> tuple[Tensor, ...]:
        """Add the gradients of `module(*inputs)`; the `last` part of a batch exchanges them.

        Every process calls this equally often. Returns what the module did, detached; the loss comes first.
        """
        ...

    def step(self, learning_rate: float, clip: float | None) -> None:
        """Clip the gradient's norm, move the parameters (every group at this rate), forget the gradients."""
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """`<parameter>.<entry>`, whole, on the CPU, until the next step changes it; every process must ask."""
        ...

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `optimizer_state` gave, here or under another strategy; every process must call.

        Raises:
            UserError: it is the state of another model.
        """
        ...


def make_strategy(
    kind: StrategyName,
    place: Place,
    module: nn.Module,
    make_optimizer: MakeOptimizer,
    *,
    batch_size: int = 1,
    accumulate: int = 1,
    clip: float | None = None,
    zero_stage: int = 1,
    idle_inputs: Callable[[], tuple[Any, ...]] | None = None,
    unused_parameters: bool = False,
) -> Strategy:
    """The strategy around a module that lies on the place's device; evaluate with the module itself.

    Args:
        module: `forward(*inputs)` returns a tuple with the loss first, or the loss alone. Losses are averaged over
            processes, never summed. It may use collectives of its own, with gradients too, if every process does
            the same ones in the same order. A parameter that is one number is of shape [1]: DeepSpeed takes no other.
        make_optimizer: is given the named parameters that require a gradient. Under `deepspeed` the optimiser sees
            flat pieces of them: it must act on every element alone (SGD, Adam, AdamW; not LAMB).
        batch_size: of a step, over all processes; DeepSpeed wants to know.
        accumulate: calls of `learn` in a step.
        clip: what `step` will be given; DeepSpeed must know at the beginning.
        zero_stage: of DeepSpeed, 1 or 2.
        idle_inputs: makes some valid inputs. DeepSpeed has places for a loaded state only after a first step, which
            is done with them at learning rate 0; without them it cannot resume.
        unused_parameters: some parameters may get no gradient in some steps; they stay where they are, but DeepSpeed
            takes the gradient to be zero, so that weight decay and momentum still move them.

    Raises:
        UserError: the strategy's package is missing, or its environment disagrees.
    """
    options = _Options(batch_size, accumulate, clip, zero_stage, idle_inputs, unused_parameters)
    kinds = {"ddp": _DataParallel, "accelerate": _Accelerated, "deepspeed": _DeepSpeed}
    return kinds[kind](place, module, make_optimizer, options)


@dataclass(frozen=True)
class _Options:
    batch_size: int
    accumulate: int
    clip: float | None
    zero_stage: int
    idle_inputs: Callable[[], tuple[Any, ...]] | None
    unused_parameters: bool


class _DataParallel:
    """torch's DistributedDataParallel; a single process needs none."""

    def __init__(self, place: Place, module: nn.Module, make_optimizer: MakeOptimizer, options: _Options) -> None:
        self._named = _trained(module)
        self._optimizer: Any = make_optimizer(list(self._named.items()))
        self._module: Any = module
        if place.world > 1:  # buffers, such as a frozen head, are every process's own: they need not be sent round
            devices = [place.device] if place.device.type == "cuda" else None
            unused = options.unused_parameters
            self._module = DistributedDataParallel(
                module, device_ids=devices, broadcast_buffers=False, find_unused_parameters=unused
            )

    def learn(self, inputs: tuple[Any, ...], last: bool) -> tuple[Tensor, ...]:
        with nullcontext() if last else self._alone():
            outputs = _as_tuple(self._module(*inputs))
            self._backward(outputs[0])
        return tuple(value.detach() for value in outputs)

    def _alone(self) -> Any:
        """Gradients stay in this process for now."""
        return self._module.no_sync() if isinstance(self._module, DistributedDataParallel) else nullcontext()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float, clip: float | None) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(self._named.values()), clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> dict[str, Tensor]:
        state = counted(self._optimizer)
        for name, parameter in self._named.items():
            own = self._optimizer.state.get(parameter, {})
            state |= {f"{name}.{entry}": value.cpu() for entry, value in entries(own)}
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        if not state:
            return
        named = by_name(state, self._named, self._optimizer)
        places = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        names = {parameter: name for name, parameter in self._named.items()}
        by_place = {i: named[names[parameter]] for i, parameter in enumerate(places) if names[parameter] in named}
        # torch's own way in knows which entries belong on which device, and in which number format.
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": by_place})


class _Accelerated(_DataParallel):
    """Hugging Face accelerate over the processes that have met already."""

    def __init__(self, place: Place, module: nn.Module, make_optimizer: MakeOptimizer, options: _Options) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        self._named = _trained(module)
        ways = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=options.unused_parameters)
        self._accelerator = Accelerator(cpu=place.device.type == "cpu", kwargs_handlers=[ways])
        if self._accelerator.num_processes != place.world:
            raise UserError(
                f"train.strategy=accelerate: {place.world} workers, but accelerate counts "
                f"{self._accelerator.num_processes}. Is an ACCELERATE_* variable set in the workers' environment?"
            )
        self._module, wrapped = self._accelerator.prepare(module, make_optimizer(list(self._named.items())))
        self._optimizer = wrapped.optimizer

    def _backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)


class _DeepSpeed:
    """DeepSpeed's engine: the optimiser holds one flat piece of every group, and its state is put together to save."""

    def __init__(self, place: Place, module: nn.Module, make_optimizer: MakeOptimizer, options: _Options) -> None:
        try:
            import deepspeed
        except ImportError as error:
            raise UserError(f"train.strategy=deepspeed: deepspeed cannot be imported: {error}.") from None
        self._named, self._idle_inputs = _trained(module), options.idle_inputs
        assert all(p.dim() for p in module.parameters()), "DeepSpeed takes no parameter of no dimension"
        settings = {
            "train_micro_batch_size_per_gpu": max(1, options.batch_size // place.world // options.accumulate),
            "gradient_accumulation_steps": options.accumulate,
            "gradient_clipping": options.clip or 0.0,
            "zero_optimization": {"stage": options.zero_stage},
            "zero_allow_untested_optimizer": True,
        }
        if not torch.distributed.is_initialized():
            deepspeed.init_distributed(dist_backend="nccl" if place.device.type == "cuda" else "gloo")
        optimizer = make_optimizer(list(self._named.items()))
        group_of = {p: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._group = {name: group_of[parameter] for name, parameter in self._named.items()}
        named: Any = list(self._named.values())  # typed as a module there, documented as parameters
        made = deepspeed.initialize(model=module, optimizer=optimizer, model_parameters=named, config=settings)
        self._engine: Any = made[0]

    def learn(self, inputs: tuple[Any, ...], last: bool) -> tuple[Tensor, ...]:
        self._engine.set_gradient_accumulation_boundary(last)
        outputs = _as_tuple(self._engine(*inputs))
        self._engine.backward(outputs[0], scale_wrt_gas=False)
        if not last:
            self._engine.step()  # counts the part; nothing moves before the boundary
        return tuple(value.detach() for value in outputs)

    def step(self, learning_rate: float, clip: float | None) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()

    def optimizer_state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        state = counted(self._inner)
        self._link_states()
        for name, parameter in self._named.items():
            flat, own = self._piece(name)
            for entry, value in entries(own):
                whole = safe_get_full_optimizer_state(parameter, entry) if value.shape == flat.shape else value
                assert whole is not None, f"DeepSpeed keeps no {entry} of {name}"
                state[f"{name}.{entry}"] = whole.detach().cpu().clone()
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if not state:
            return
        assert self._idle_inputs is not None, "a DeepSpeed training can only be resumed with idle inputs"
        self.learn(self._idle_inputs(), last=True)
        self.step(0.0, None)
        self._link_states()
        for name, saved in by_name(state, self._named, self._inner).items():
            flat, own = self._piece(name)
            for entry, value in saved.items():
                if entry not in own:
                    raise foreign(f"{name}.{entry}")
                there = own[entry]
                if isinstance(there, Tensor) and isinstance(value, Tensor) and there.shape == flat.shape:
                    parameter = self._named[name]
                    if value.shape != parameter.shape:
                        raise foreign(f"{name}.{entry}")
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), entry)
                else:
                    own[entry] = value

    @property
    def _inner(self) -> Any:
        return self._engine.optimizer.optimizer

    def _link_states(self) -> None:
        """Let every parameter find its part of the state; DeepSpeed itself does it too early for the second group."""
        self._engine.optimizer._hp_optimizer_states_linked = False
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _piece(self, name: str) -> tuple[Tensor, dict[str, Any]]:
        """This process's flat piece of the parameter's group, and its state."""
        (flat,) = self._inner.param_groups[self._group[name]]["params"]
        return flat, self._inner.state.get(flat, {})


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
