"""How training processes share the work: plain DDP, accelerate or DeepSpeed, behind one small protocol. Knows no Ray.

Every strategy averages gradients over processes and keeps parameters in float32. The optimiser's state is saved and
loaded by parameter name, `<parameter>.<entry>`, whatever the optimiser: any strategy resumes from another's checkpoint.
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
from pema_ray.training.optimizer_state import group_steps, load_by_name, mismatch, state_entries

StrategyName = Literal["ddp", "accelerate", "deepspeed"]
MakeOptimizer = Callable[[Sequence[tuple[str, nn.Parameter]]], Optimizer]
"""Makes an optimiser of named parameters; it may group them (weight decay) by name."""


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

        Every process calls this equally often. Returns the module's outputs, detached, the loss first.
        """
        ...

    def step(self, learning_rate: float, clip: float | None) -> None:
        """Clip the gradient's norm, update the parameters (one rate for all groups), clear the gradients."""
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """The full state on the CPU, as `<parameter>.<entry>`, valid until the next step; every process must call."""
        ...

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `optimizer_state` returned, here or under another strategy; every process must call.

        Raises:
            UserError: the state belongs to another model.
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
    """The strategy around a module on the place's device; evaluate with the module itself.

    Args:
        module: `forward(*inputs)` returns a tuple with the loss first, or the loss alone. Losses are averaged over
            processes, never summed. It may use collectives, with gradients too, if every process calls the same ones
            in the same order. A scalar parameter must have shape [1]: DeepSpeed takes no other.
        make_optimizer: receives the named parameters that require a gradient. Under `deepspeed` the optimiser sees
            flat partitions of them: it must be element-wise (SGD, Adam, AdamW; not LAMB).
        batch_size: of a step, over all processes; for DeepSpeed.
        accumulate: calls of `learn` in a step.
        clip: the argument of every `step`; DeepSpeed must know it in advance.
        zero_stage: of DeepSpeed, 1 or 2.
        idle_inputs: makes some valid inputs. DeepSpeed can load a state only after a first step, which takes these
            inputs at learning rate 0; without them it cannot resume.
        unused_parameters: some parameters may get no gradient in some steps, and then do not change; but DeepSpeed
            takes the gradient to be zero, so that weight decay and momentum still apply.

    Raises:
        UserError: the strategy's package is missing, or its environment disagrees.
    """
    if kind == "deepspeed":
        return _DeepSpeed(place, module, make_optimizer, batch_size, accumulate, clip, zero_stage, idle_inputs)
    data_parallel = _Accelerated if kind == "accelerate" else _DataParallel
    return data_parallel(place, module, make_optimizer, unused_parameters)


class _DataParallel:
    """torch's DistributedDataParallel; a single process needs none."""

    def __init__(self, place: Place, module: nn.Module, make_optimizer: MakeOptimizer, unused: bool) -> None:
        self._parameters = _trained(module)
        self._optimizer: Any = make_optimizer(list(self._parameters.items()))
        self._module: Any = module
        if place.world > 1:  # buffers, such as a frozen head, are equal in all processes: no need to broadcast them
            devices = [place.device] if place.device.type == "cuda" else None
            self._module = DistributedDataParallel(
                module, device_ids=devices, broadcast_buffers=False, find_unused_parameters=unused
            )

    def learn(self, inputs: tuple[Any, ...], last: bool) -> tuple[Tensor, ...]:
        with nullcontext() if last else self._no_sync():
            outputs = _as_tuple(self._module(*inputs))
            self._backward(outputs[0])
        return tuple(value.detach() for value in outputs)

    def _no_sync(self) -> Any:
        return self._module.no_sync() if isinstance(self._module, DistributedDataParallel) else nullcontext()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float, clip: float | None) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> dict[str, Tensor]:
        state = group_steps(self._optimizer)
        for name, parameter in self._parameters.items():
            entries = state_entries(self._optimizer.state.get(parameter, {}))
            state |= {f"{name}.{entry}": value.cpu() for entry, value in entries}
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        if not state:
            return
        states = load_by_name(state, self._parameters, self._optimizer)
        ordered = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        names = {parameter: name for name, parameter in self._parameters.items()}
        by_index = {i: states[names[parameter]] for i, parameter in enumerate(ordered) if names[parameter] in states}
        # torch's own loading knows which entries belong on which device, and in which number format.
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": by_index})


class _Accelerated(_DataParallel):
    """Hugging Face accelerate over the process group that is initialised already."""

    def __init__(self, place: Place, module: nn.Module, make_optimizer: MakeOptimizer, unused: bool) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        self._parameters = _trained(module)
        ddp_kwargs = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=unused)
        self._accelerator = Accelerator(cpu=place.device.type == "cpu", kwargs_handlers=[ddp_kwargs])
        if self._accelerator.num_processes != place.world:
            raise UserError(
                f"train.strategy=accelerate: {place.world} workers, but accelerate counts "
                f"{self._accelerator.num_processes}. Is an ACCELERATE_* variable set in the workers' environment?"
            )
        self._module, wrapped = self._accelerator.prepare(module, make_optimizer(list(self._parameters.items())))
        self._optimizer = wrapped.optimizer

    def _backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)


class _DeepSpeed:
    """DeepSpeed's engine: the optimiser holds one flat partition of every group; its state is gathered to save it."""

    def __init__(
        self,
        place: Place,
        module: nn.Module,
        make_optimizer: MakeOptimizer,
        batch_size: int,
        accumulate: int,
        clip: float | None,
        zero_stage: int,
        idle_inputs: Callable[[], tuple[Any, ...]] | None,
    ) -> None:
        try:
            import deepspeed
        except ImportError as error:
            raise UserError(f"train.strategy=deepspeed: deepspeed cannot be imported: {error}.") from None
        self._parameters, self._idle_inputs = _trained(module), idle_inputs
        assert all(p.dim() for p in module.parameters()), "DeepSpeed takes no parameter without dimensions"
        settings = {
            "train_micro_batch_size_per_gpu": max(1, batch_size // place.world // accumulate),
            "gradient_accumulation_steps": accumulate,
            "gradient_clipping": clip or 0.0,
            "zero_optimization": {"stage": zero_stage},
            "zero_allow_untested_optimizer": True,
        }
        if not torch.distributed.is_initialized():
            deepspeed.init_distributed(dist_backend="nccl" if place.device.type == "cuda" else "gloo")
        optimizer = make_optimizer(list(self._parameters.items()))
        group_of = {p: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._group = {name: group_of[parameter] for name, parameter in self._parameters.items()}
        parameters: Any = list(self._parameters.values())  # typed as a module there, documented as parameters
        self._engine: Any = deepspeed.initialize(
            model=module, optimizer=optimizer, model_parameters=parameters, config=settings
        )[0]

    def learn(self, inputs: tuple[Any, ...], last: bool) -> tuple[Tensor, ...]:
        self._engine.set_gradient_accumulation_boundary(last)
        outputs = _as_tuple(self._engine(*inputs))
        self._engine.backward(outputs[0], scale_wrt_gas=False)
        if not last:
            self._engine.step()  # counts the part; no parameter changes before the boundary
        return tuple(value.detach() for value in outputs)

    def step(self, learning_rate: float, clip: float | None) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()

    def optimizer_state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        state = group_steps(self._inner)
        self._link_states()
        for name, parameter in self._parameters.items():
            flat, partition_state = self._partition(name)
            for entry, value in state_entries(partition_state):
                full = safe_get_full_optimizer_state(parameter, entry) if value.shape == flat.shape else value
                assert full is not None, f"DeepSpeed keeps no {entry} of {name}"
                state[f"{name}.{entry}"] = full.detach().cpu().clone()
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if not state:
            return
        assert self._idle_inputs is not None, "a DeepSpeed training can only be resumed with idle inputs"
        self.learn(self._idle_inputs(), last=True)
        self.step(0.0, None)
        self._link_states()
        for name, saved in load_by_name(state, self._parameters, self._inner).items():
            flat, partition_state = self._partition(name)
            for entry, value in saved.items():
                if entry not in partition_state:
                    raise mismatch(f"{name}.{entry}")
                current = partition_state[entry]
                if isinstance(current, Tensor) and isinstance(value, Tensor) and current.shape == flat.shape:
                    parameter = self._parameters[name]
                    if value.shape != parameter.shape:
                        raise mismatch(f"{name}.{entry}")
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), entry)
                else:
                    partition_state[entry] = value

    @property
    def _inner(self) -> Any:
        return self._engine.optimizer.optimizer

    def _link_states(self) -> None:
        """Link every parameter to its part of the state; DeepSpeed itself links too early for the second group."""
        self._engine.optimizer._hp_optimizer_states_linked = False
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _partition(self, name: str) -> tuple[Tensor, dict[str, Any]]:
        """This process's flat partition of the parameter's group, and its state."""
        (flat,) = self._inner.param_groups[self._group[name]]["params"]
        return flat, self._inner.state.get(flat, {})


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
