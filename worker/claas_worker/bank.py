"""The adapter bank: LoRA adapters of any rank and targets on one frozen base, each acting on its own rows of a batch.

    y[row] = W x[row] + scaling * B (A x[row])          of the row's adapter, if it has this layer; else W x[row]

What is unusual:
- No module of the base is ever replaced. Each linear layer carries one forward hook, installed once; with no adapter
  active it returns the layer's output untouched. So nothing of an adapter can stay, whatever its targets and rank were,
  and however its loading or its forward pass ended.
- Rows are split, changed out of place and put together again; no product ever mixes two adapters. A NaN in one
  adapter's weights stays in its rows, forward and backward, and with rows of equal shape the others' bits do not depend
  on what it holds.
- The arithmetic is PEFT's to the bit (`x` is cast to the weights' precision, the sum back to the base's), and so is the
  meaning of an adapter_config.json: PEFT injects it into a skeleton of the model without memory, on the meta device,
  and ranks and scalings are read off what it built.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from claas_store.checks import names_another_base, shown
from claas_store.limits import MAX_HEADER_BYTES, MAX_RANK
from claas_worker.engine_adapters import Flat, FlatState, flatten
from claas_worker.engine_decoder import Place
from claas_worker.errors import AdapterInvalid, VersionConflict

PREFIX = "base_model.model."  # of every key in PEFT's adapter_model.safetensors
NAME = "default"  # PEFT's name of the adapter inside the skeleton; it is not part of the keys
LAYOUTS = 64  # configurations whose layout is remembered: a few hundred small tuples each

# Fields of adapter_config.json that shape the adapter; and those that change neither its forward pass nor its gradient.
USED_FIELDS = frozenset({"r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"}) | {
    "use_rslora",
    "layers_to_transform",
    "layers_pattern",
}
FREE_FIELDS = frozenset({"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"}) | {
    "revision",
    "inference_mode",
    "lora_dropout",
    "init_lora_weights",
    "fan_in_fan_out",
}
# Initializations that leave the base as it is. PiSSA, OLoRA, LoftQ ... store adapters of a changed base.
PLAIN_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


class Shape(NamedTuple):
    """What a configuration makes of one linear layer."""

    a: tuple[int, int]  # (r, in)
    b: tuple[int, int]  # (out, r)
    scaling: float


class Lora(NamedTuple):
    """One layer of an adapter."""

    a: nn.Parameter  # (r, in)
    b: nn.Parameter  # (out, r)
    scaling: float

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        """`output` (..., out) of the layer at `x` (..., in), with the adapter: PEFT's operations in PEFT's order."""
        delta = linear(linear(x.to(self.a.dtype), self.a), self.b) * self.scaling
        return (output + delta).to(output.dtype)


class Adapter:
    """A LoRA adapter in memory.

    Attributes:
        config: adapter_config.json.
        layers: by the name of the linear layer.
        parameters: A and B, trainable, by their keys in adapter_model.safetensors, sorted. In fp32, or in float64 on a
            base in float64.
        flat: the same weights as one tensor, with what the engine keeps beside it; None where it does not take part.
    """

    def __init__(self, config: Mapping[str, Any], layers: Mapping[str, Lora], flat: FlatState | None = None) -> None:
        self.config = dict(config)
        self.flat = flat
        self.manifest_sha256 = ""  # of the version that these weights are
        self.layers = dict(layers)
        by_key = {key: side for name, lora in layers.items() for key, side in zip(_keys(name), lora[:2], strict=True)}
        self.parameters: dict[str, nn.Parameter] = dict(sorted(by_key.items()))

    @property
    def size_bytes(self) -> int:
        """Of the parameters, and of the moments that the engine keeps."""
        if self.flat is not None:
            return self.flat.size_bytes
        return sum(p.numel() * p.element_size() for p in self.parameters.values())

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """The weights, copied, as adapter_model.safetensors holds them."""
        if self.flat is not None:
            return self.flat.arrays()
        return {key: parameter.detach().float().cpu().numpy().copy() for key, parameter in self.parameters.items()}


class Bank:
    """Adapters on one base model. For one thread, and one bank per model.

    Adapters are resident under a key: the uri of the version whose weights they are (or are about to become, while they
    are trained), since a version never changes.

    Args:
        model: a causal language model; its parameters must not require gradients.
        base_model: its id, as adapters name it; empty: adapters of any base are taken as they come.
        capacity_bytes: what all adapters together may take as long as some of them are idle: the least recently used of
            those go first, one that is in use never does. 0 keeps no idle adapter beside a new one.

    Attributes:
        largest_bytes: of any adapter's file on this base, at the highest rank on every layer.
    """

    def __init__(self, model: Any, *, base_model: str = "", capacity_bytes: int = 0) -> None:
        self.base_model = base_model
        self._capacity_bytes = capacity_bytes
        self._places: Mapping[str, Place] = {}
        head = model.get_output_embeddings()
        self._head_name = next(name for name, module in model.named_modules() if module is head)
        self._linears = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name != self._head_name
        }
        width = sum(module.in_features + module.out_features for module in self._linears.values())
        self.largest_bytes = 4 * MAX_RANK * width + MAX_HEADER_BYTES
        self._skeleton = _skeleton(model)
        self._layouts: dict[str, dict[str, Shape]] = {}
        self._residents: OrderedDict[str, Adapter] = OrderedDict()  # least recently used first
        self._users: Counter[str] = Counter()
        self._tokens = 1
        self._active: dict[str, list[tuple[Lora | None, int]]] = {}  # by layer: runs of equal rows; empty when off
        for name, module in self._linears.items():
            module.register_forward_hook(functools.partial(self._hook, name))

    def add(self, key: str, config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Adapter:
        """Makes an adapter resident, in the place of an idle one with this key; idle ones go where there is no room.

        Args:
            config: adapter_config.json.
            tensors: adapter_model.safetensors, copied: every key that the config asks for and no other.

        Raises:
            AdapterInvalid: another base, a kind of adapter that is not trained here, a wrong key, shape or value.
            VersionConflict: one with this key is in use.
        """
        if self._users[key]:
            raise VersionConflict(f"{key} is being trained by another request")
        adapter = self._load(config, tensors)
        self.put(key, adapter)
        return adapter

    def get(self, key: str) -> Adapter | None:
        """The resident adapter, now the most recently used; or None."""
        if key in self._residents:
            self._residents.move_to_end(key)
        return self._residents.get(key)

    def flatten(self, places: Mapping[str, Place]) -> None:
        """Adapters that come from now on are one tensor each, where all their layers are among these."""
        self._places = places

    def take(self, key: str) -> Adapter | None:
        """The adapter, no longer resident: it is the caller's; None where there is none, or it is in use."""
        return None if self._users[key] else self._residents.pop(key, None)

    def put(self, key: str, adapter: Adapter) -> None:
        """Makes one that was taken resident, as the most recently used, under a key that is not in use."""
        self._residents.pop(key, None)
        self._evict(self._capacity_bytes - adapter.size_bytes)
        self._residents[key] = adapter

    def keep(self, key: str, adapter: Adapter) -> None:
        """The same for an idle one, which goes at once if it alone is beyond the capacity."""
        if not self._users[key]:
            self.put(key, adapter)
            self._evict(self._capacity_bytes)

    @contextlib.contextmanager
    def in_use(self, key: str) -> Iterator[Adapter]:
        """The resident adapter, which stays as long as the context lasts.

        Raises:
            KeyError: there is none.
        """
        adapter = self._residents[key]
        self._residents.move_to_end(key)
        self._users[key] += 1
        try:
            yield adapter
        finally:
            self._users[key] -= 1
            self._evict(self._capacity_bytes)

    def remove(self, key: str) -> None:
        """Lets an adapter go, if it is there.

        Raises:
            ValueError: it is in use.
        """
        if self._users[key]:
            raise ValueError(f"{key} is in use")
        del self._users[key]
        self._residents.pop(key, None)

    @contextlib.contextmanager
    def active(self, rows: Sequence[Adapter | None], tokens: int = 1) -> Iterator[None]:
        """While the context lasts, row i of every batch belongs to adapter `rows[i]`; None: to the base alone.

        Args:
            tokens: of each row, for layers that are shown all tokens of a batch one after the other, as those of
                mixtures of experts are.

        Rows of one adapter should lie side by side: each run of equal rows is one product. No rows: adapters off. A
        backward pass may come later; one that runs the forward pass again (checkpointing) may not.

        Raises:
            RuntimeError: the context is entered within itself, or a batch has another number of rows.
        """
        if self._active:
            raise RuntimeError("adapters are active already")
        self._tokens = tokens
        targets = {name for adapter in rows if adapter is not None for name in adapter.layers}
        self._active = {
            name: _runs([None if adapter is None else adapter.layers.get(name) for adapter in rows]) for name in targets
        }
        try:
            yield
        finally:
            self._active = {}

    def _hook(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """What a layer gives instead of `output`; None: `output` itself."""
        runs = self._active.get(name)
        if runs is None:
            return None
        (x,) = args  # (B, ..., in), or (B T, in)
        counts = [count for _, count in runs]
        if x.ndim == 2 and len(x) == self._tokens * sum(counts):
            counts = [count * self._tokens for count in counts]
        if output.shape[0] != sum(counts):
            raise RuntimeError(f"{name} sees {output.shape[0]} rows, adapters are active for {sum(counts)}")
        if len(runs) == 1:
            ((lora, _),) = runs
            return None if lora is None else lora.add_to(output, x)
        parts = zip(runs, output.split(counts), x.split(counts), strict=True)
        return torch.cat([part if lora is None else lora.add_to(part, rows) for (lora, _), part, rows in parts])

    def _load(self, config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Adapter:
        layout = self._layout(lora_config(config, self.base_model))
        shapes = {key: side for name, s in layout.items() for key, side in zip(_keys(name), s[:2], strict=True)}
        missing, unexpected = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
        if missing:
            raise AdapterInvalid(f"adapter_model.safetensors lacks {missing[0]} (and {len(missing) - 1} more keys)")
        if unexpected:
            count = len(unexpected) - 1
            raise AdapterInvalid(
                f"adapter_model.safetensors holds {shown(unexpected[0])} (and {count} more keys) for no target"
            )
        checked: dict[str, Tensor] = {}
        for key in sorted(shapes):
            given = torch.from_numpy(np.array(tensors[key], dtype=np.float32))
            if tuple(given.shape) != shapes[key]:
                expected = f"{tuple(given.shape)}, expected {shapes[key]}"
                raise AdapterInvalid(f"adapter_model.safetensors: {key} has shape {expected}")
            if not bool(given.isfinite().all()):
                raise AdapterInvalid(f"adapter_model.safetensors: {key} holds values that are not finite")
            checked[key] = given
        if (flat := flatten(layout, self._places, _keys)) is not None:
            return self._flat(config, layout, flat, checked)
        layers = {}
        for name, shape in layout.items():
            weight = self._linears[name].weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            a, b = (nn.Parameter(checked[key].to(weight.device, dtype)) for key in _keys(name))
            layers[name] = Lora(a, b, shape.scaling)
        return Adapter(config, layers)

    def _flat(
        self, config: Mapping[str, Any], layout: Mapping[str, Shape], flat: Flat, tensors: Mapping[str, Tensor]
    ) -> Adapter:
        """An adapter whose parameters are views of one tensor."""
        device = next(iter(self._linears.values())).weight.device
        joined = flat.join(tensors, torch.empty(flat.size, pin_memory=device.type == "cuda"))
        state = FlatState(flat, joined.to(device))
        views = flat.split(state.weights)
        layers = {}
        for name, shape in layout.items():
            a, b = (nn.Parameter(views[key]) for key in _keys(name))
            layers[name] = Lora(a, b, shape.scaling)
        return Adapter(config, layers, state)

    def _layout(self, lora: LoraConfig) -> dict[str, Shape]:
        """What PEFT makes of a configuration, by linear layer."""
        key = json.dumps({field: getattr(lora, field) for field in USED_FIELDS}, sort_keys=True, default=sorted)
        if key not in self._layouts:
            layout = self._inject(lora)
            if len(self._layouts) >= LAYOUTS:
                del self._layouts[next(iter(self._layouts))]
            self._layouts[key] = layout
        return self._layouts[key]

    def _inject(self, lora: LoraConfig) -> dict[str, Shape]:
        skeleton = copy.deepcopy(self._skeleton)
        try:
            inject_adapter_in_model(lora, skeleton, NAME, low_cpu_mem_usage=True)
        except (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError) as error:
            raise AdapterInvalid(f"adapter_config.json does not fit the base model: {error}") from error
        layout = {}
        for name, layer in skeleton.named_modules():
            if not isinstance(layer, BaseTunerLayer):
                continue
            if not isinstance(layer, LoraLayer) or name not in self._linears:
                raise AdapterInvalid(f"adapter_config.json: target_modules match {name}, which cannot be trained here")
            a, b = (tuple(getattr(layer, side)[NAME].weight.shape) for side in ("lora_A", "lora_B"))
            layout[name] = Shape(a, b, float(layer.scaling[NAME]))
        return layout

    def _evict(self, room_bytes: int) -> None:
        """Idle adapters go until all take at most `room_bytes`, or none is idle."""
        taken = sum(adapter.size_bytes for adapter in self._residents.values())
        for key in [key for key in self._residents if not self._users[key]]:
            if taken <= room_bytes:
                return
            taken -= self._residents.pop(key).size_bytes
            del self._users[key]


def lora_config(config: Mapping[str, Any], base_model: str = "") -> LoraConfig:
    """PEFT's configuration from adapter_config.json, without dropout.

    Raises:
        AdapterInvalid: no LoRA, of another base model, or with a feature that changes more than plain A and B matrices.
    """
    if config.get("peft_type") != "LORA":
        raise AdapterInvalid(
            f"adapter_config.json: peft_type is {config.get('peft_type')!r}, only LORA is trained here"
        )
    if names_another_base(config, base_model):
        base = str(config["base_model_name_or_path"])[:253]
        raise AdapterInvalid(f"the adapter belongs to the base model {base}, this worker holds {base_model}")
    if (initial := config.get("init_lora_weights")) not in PLAIN_INITIALIZATIONS:
        raise AdapterInvalid(
            f"adapter_config.json: init_lora_weights {initial!r} changes the base model: convert it first"
        )
    defaults = LoraConfig().to_dict()
    for field, value in config.items():
        if field not in USED_FIELDS | FREE_FIELDS and value and value != defaults.get(field):
            raise AdapterInvalid(f"adapter_config.json: {field} is not supported here")
    if not config.get("target_modules"):
        raise AdapterInvalid("adapter_config.json: target_modules is missing")
    used = {field: config[field] for field in USED_FIELDS if config.get(field) is not None}
    try:
        return LoraConfig(**used, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")
    except (ValueError, TypeError) as error:
        raise AdapterInvalid(f"adapter_config.json: {error}") from error


def _skeleton(model: nn.Module) -> Any:
    """The model without its memory: every parameter and buffer is on the meta device, the modules are copies."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _keys(name: str) -> tuple[str, str]:
    """The keys of a layer's A and B in adapter_model.safetensors."""
    return f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"


def _runs(rows: Sequence[Lora | None]) -> list[tuple[Lora | None, int]]:
    """Neighbours that are the same, and how many."""
    return [(group[0], len(group)) for group in (list(same) for _, same in itertools.groupby(rows, key=id))]
