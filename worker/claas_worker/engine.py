"""The engine: forward and backward passes of many adapters at once, in CUDA graphs over buckets of shapes.

A pass is two fixed sequences of kernels over static memory: token ids and the adapters' weights in, hidden states out;
their gradient in, the adapters' gradients out. Loss and update lie between and behind them, and nothing waits for the
device before a whole step has been handed to it.

What is unusual:
- Adapters of any rank and targets share a product: each is cast into a slot of the batch's largest rank, zero where it
  has no weights, so what it adds there is exactly nothing. A row meets only its own slot.
- Shapes are rounded up to buckets. The first pass of a bucket runs as plain torch, at once; a thread compiles the
  functions between the products, once, and captures the bucket. The next pass is two launches.
- All graphs share one pool of memory: a bucket's activations are dead when its backward pass has run, so the pool is
  little larger than the largest bucket needs. Where there are `GRAPHS` buckets, or a new one has no room beside the
  pool, all are dropped, and captured anew on use.
- On a CPU the same code runs uncompiled and uncaptured: what the tests compare with plain PEFT is what the graphs hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import torch
from torch import Tensor

from claas_worker.engine_adapters import ROW, Block, FlatState, adamw
from claas_worker.engine_decoder import TAIL, WIDE_RANK, Decoder, Rows, Unsupported, check, few_of
from claas_worker.job import place
from claas_worker.sdpo import PLAIN_SCORE, LossBatch, Score, on_its_way

log = logging.getLogger(__name__)

LENGTHS = (64, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)  # then by 512
LENGTH_STEP = 512
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # then by 32
COUNT_STEP = 32
RANKS = (WIDE_RANK, 32, 64, 128, 256, 512)
GRAPHS = 16
COMPILED_SOURCES = ("engine_decoder.py", "engine_adapters.py", "sdpo.py", "sdpo_kernels.py")
SCORERS = 8  # kinds of options whose loss is compiled
SPARE_BYTES = 3 << 30  # what a step takes beside its pass: a chunk's logits, gradients, cuBLAS
SLACK = 1.15  # of activations, over what is counted
PROOF_TOLERANCE = 0.1  # of hidden states against the model's own, relative to their norm, in bf16
EXACT_PROOF_TOLERANCE = 1e-4  # the same in fp32
PROOF_TOKENS = 24


class Shape(NamedTuple):
    """A bucket."""

    adapters: int  # n
    rows: int  # of each adapter
    length: int  # tokens
    rank: int


class Slots:
    """n adapters' weights in the decoder's `lora_dtype`, as the passes read them, and gradients as these write them.

    Attributes:
        a, b: by group, (n, layers, p r, i) and (n, layers, o, p r): member j of a group has columns j r to (j+1) r.
        grad_a, grad_b: the same shapes; of grad_b only the members' own blocks have a meaning.
    """

    def __init__(self, decoder: Decoder, n: int, rank: int) -> None:
        self.rank = rank
        self._ends = [ends for _, ends in decoder.shapes]
        layers, like = len(decoder.layers), decoder.embedding
        sizes = [
            ((n, layers, len(ends) * rank, i), (n, layers, ends[-1], len(ends) * rank)) for i, ends in decoder.shapes
        ]
        own = decoder.lora_dtype
        if n == 1 and rank == WIDE_RANK and own == like.dtype:
            self.a, self.b = ([sides[side] for sides in decoder.around] for side in (0, 1))
        else:
            self.a, self.b = ([like.new_zeros(size[side], dtype=own) for size in sizes] for side in (0, 1))
        self.grad_a, self.grad_b = ([like.new_empty(size[side], dtype=own) for size in sizes] for side in (0, 1))
        self._views: list[list[tuple[Block, Tensor, Tensor, Tensor, Tensor]]] = [[]] * n  # by slot, of what it holds
        self._held: list[object] = [""] * n  # layout of what a slot holds: it is zero elsewhere

    def load(self, slot: int, adapter: FlatState | None) -> None:
        """The adapter's weights, B scaled, into a slot."""
        layout = None if adapter is None else adapter.layout.blocks
        if self._held[slot] != layout:
            for tensor in (*self.a, *self.b):
                tensor[slot].zero_()
            self._held[slot] = layout
            self._views[slot] = [] if adapter is None else [self._view(slot, block) for block in adapter.layout.blocks]
        if adapter is None:
            return
        for (block, a, b, _, _), (own_a, own_b) in zip(self._views[slot], adapter.parts, strict=True):
            a.copy_(own_a)
            torch.mul(own_b, block.scaling, out=b)

    def gradient(self, slot: int, adapter: FlatState, out: Tensor, *, add: bool) -> None:
        """The adapter's gradient from a slot, into or onto `out` (P,) fp32."""
        parts = adapter.layout.parts(out)
        for (block, _, _, a, b), (own_a, own_b) in zip(self._views[slot], parts, strict=True):
            if add:
                own_a.add_(a)
                own_b.add_(b, alpha=block.scaling)
            else:
                own_a.copy_(a)
                torch.mul(b, block.scaling, out=own_b)
        if not add:
            out[adapter.layout.used :] = 0

    def _view(self, slot: int, block: Block) -> tuple[Block, Tensor, Tensor, Tensor, Tensor]:
        """A block's place in a slot: of A, B and their gradients."""
        columns = slice(block.member * self.rank, block.member * self.rank + block.rank)
        layers, ends = slice(block.first, block.last), self._ends[block.group]
        outputs = slice(ends[block.member - 1] if block.member else 0, ends[block.member])
        a, b, grad_a, grad_b = (side[block.group][slot, layers] for side in (self.a, self.b, self.grad_a, self.grad_b))
        return (
            block,
            a[:, columns],
            b[:, outputs, columns],
            grad_a[:, columns],
            grad_b[:, outputs, columns],
        )


class Bucket:
    """Static memory of one shape, and its graphs once they are captured."""

    def __init__(self, decoder: Decoder, shape: Shape, slots: Slots) -> None:
        self.shape, self.slots, self._decoder = shape, slots, decoder
        batch = shape.adapters * shape.rows
        device = decoder.embedding.device
        self.ids = torch.zeros(batch, shape.length, dtype=torch.long, device=device)
        self.angles = decoder.angles(batch, shape.length)
        self.hidden = decoder.embedding.new_zeros(batch * shape.length, decoder.embedding.shape[1])  # (N, d)
        self.gradient = torch.zeros_like(self.hidden)
        self._saved: list[Any] = []
        self.graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None

    def forward(self, rows: Rows, *, keep: bool) -> None:
        """`hidden` of `ids`; what the backward pass needs is kept, if it is to follow."""
        if self.graphs is not None:
            self.graphs[0].replay()
        else:
            self._forward(rows, keep=keep)

    def backward(self, rows: Rows) -> None:
        """The slots' gradients, given `gradient`; after a forward pass that kept what it needs."""
        if self.graphs is not None:
            self.graphs[1].replay()
        else:
            self._backward(rows)

    def capture(self, rows: Rows, pool: Any) -> None:
        """Both passes as graphs whose memory comes from `pool`, after one that is not captured."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward(rows, keep=True)
            self._backward(rows)
        torch.cuda.current_stream().wait_stream(side)
        graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[0], pool=pool, capture_error_mode="thread_local"):
            self._forward(rows, keep=True)
        with torch.cuda.graph(graphs[1], pool=pool, capture_error_mode="thread_local"):
            self._backward(rows)
        self.graphs = graphs

    def _forward(self, rows: Rows, *, keep: bool) -> None:
        with torch.no_grad():
            self._saved = []
            slots, saved = self.slots, self._saved if keep else None
            self.hidden.copy_(self._decoder.forward(self.ids, self.angles, slots.a, slots.b, rows, saved))

    def _backward(self, rows: Rows) -> None:
        with torch.no_grad():
            s = self.slots
            self._decoder.backward(self.gradient, self.angles, s.a, s.b, s.grad_a, s.grad_b, rows, self._saved)


class Pass:
    """One forward pass on its way: where each context's rows lie, and its backward pass."""

    def __init__(self, engine: Engine, bucket: Bucket, rows: Sequence[int], slots: Sequence[FlatState | None]) -> None:
        self._engine, self._bucket, self._rows, self._slots = engine, bucket, rows, slots
        self.hidden, self.gradient = bucket.hidden, bucket.gradient  # (N, d) of all tokens
        self.gradient.zero_()

    def start(self, context: int, prefix_tokens: int) -> int:
        """The row of `hidden` that predicts the first response token of a context."""
        return self._rows[context] * self._bucket.shape.length + prefix_tokens - 1

    def backward(self) -> None:
        """The adapters' gradients, given `gradient`."""
        if self._engine.current is not self:
            raise RuntimeError("another forward pass came between: what this one kept is gone")
        self._engine.current = None
        self._bucket.backward(self._engine.rows)

    def collect(self, adapter: FlatState, out: Tensor, *, add: bool) -> None:
        """The gradient of an adapter that takes part, into or onto `out` (P,)."""
        for slot, held in enumerate(self._slots):
            if held is adapter:
                self._bucket.slots.gradient(slot, adapter, out, add=add)
                add = True


class Engine:
    """Passes on one model, for one thread at a time: whoever uses it holds `lock`.

    Args:
        model: the frozen causal language model; its parameters become views of stacked ones, bit for bit the same.
        captures: compile and capture; by default on a GPU.
        compile_cache: folder in which compiled code outlives the process.

    Attributes:
        places: of the model's linear layers, for flat adapters.
        rows, adamw: the functions between the products, and the update; compiled once they are.

    Raises:
        Unsupported: the model is built, or computes, in another way.
    """

    def __init__(self, model: Any, *, captures: bool | None = None, compile_cache: Path | None = None) -> None:
        self.lock = threading.RLock()
        prove_a_layer(model)
        self._decoder = Decoder(model)
        self.places = self._decoder.places
        self._device = self._decoder.embedding.device
        self.rows = Rows()
        self.adamw: Callable[..., Tensor] = adamw
        self._scorers: dict[tuple[object, ...], Score] = {}
        self.current: Pass | None = None
        self._buckets: dict[Shape, Bucket] = {}
        self._slots: dict[tuple[int, int], Slots] = {}
        self._scratch = torch.empty(0, device=self._device)
        self._captures = self._device.type == "cuda" if captures is None else captures
        self._wanted: queue.SimpleQueue[Shape | LossBatch] = queue.SimpleQueue()
        self._pool: Any = None
        self._pool_bytes = 0
        self._busy = False
        self._side = torch.cuda.Stream(priority=-1) if self._device.type == "cuda" else None
        self._prove(model)
        if self._captures:
            # While one thread traces, the whole process counts as traced: a call by this one, which makes the steps, of
            # what is compiled is run plain then, which is as good, instead of refused. (The setting is a thread's own.)
            torch._dynamo.config.error_on_nested_fx_trace = False
            self._cache = None if compile_cache is None else CompileCache(compile_cache, self._decoder)
            threading.Thread(target=self._prepare, name="engine", daemon=True).start()

    def forward(
        self, sequences: Sequence[Sequence[int]], adapters: Sequence[FlatState | None], *, keep: bool = True
    ) -> Pass:
        """Starts a pass over token sequences, each with its adapter or on the base alone.

        Args:
            keep: a backward pass follows, before any other forward pass.
        """
        shape, rows, slots = arrange([len(one) for one in sequences], adapters)
        bucket = self._bucket(shape)
        ids = torch.zeros(bucket.ids.shape, dtype=torch.long)
        for row, sequence in zip(rows, sequences, strict=True):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        bucket.ids.copy_(on_its_way(ids, self._device))
        for slot, adapter in enumerate(slots):
            bucket.slots.load(slot, adapter)
        bucket.forward(self.rows, keep=keep)
        done = Pass(self, bucket, rows, slots)
        self.current = done if keep else None
        if self._captures and bucket.graphs is None:
            self._wanted.put(shape)
        return done

    def scorer(self, batch: LossBatch) -> Score:
        """For these losses; kernels of their own once they are compiled: of so many kinds of options."""
        known = self._scorers.get(batch.key)
        if known is None and self._captures and len(self._scorers) < SCORERS:
            self._scorers[batch.key] = PLAIN_SCORE
            self._wanted.put(batch)
        return known or PLAIN_SCORE

    def mark(self) -> torch.cuda.Event | None:
        """Where the device's work stands now, for `beside`."""
        return None if self._side is None else torch.cuda.current_stream().record_event()

    @contextlib.contextmanager
    def beside(self, mark: torch.cuda.Event | None) -> Iterator[None]:
        """In the context, the device's work follows what was there at `mark`, beside what has come since; what comes
        after the context follows both. Its tensors must live until the device has been waited for."""
        if self._side is None or mark is None:
            yield
            return
        self._side.wait_event(mark)
        with torch.cuda.stream(self._side):
            yield
        torch.cuda.current_stream().wait_stream(self._side)

    def scratch(self, size: int) -> Tensor:
        """(size,) fp32 for a gradient that is used up before the next is asked for."""
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, device=self._device)
        return self._scratch[:size]

    def settled(self, timeout_seconds: float) -> bool:
        """Waits until what has been used is compiled and captured; whether it is. For benchmarks."""
        deadline = monotonic() + timeout_seconds
        while monotonic() < deadline:
            if self._wanted.empty() and not self._busy:
                return True
            threading.Event().wait(0.05)
        return False

    def plainly(self) -> None:
        """From now on nothing is compiled or captured. For benchmarks."""
        with self.lock:
            self._captures = False
            self.rows, self.adamw = Rows(), adamw
            self._scorers.clear()
            self._drop()

    def _bucket(self, shape: Shape) -> Bucket:
        if shape not in self._buckets:
            if len(self._buckets) >= GRAPHS or self._room() < self._needs(shape):
                self._drop()
            key = shape.adapters, shape.rank
            if key not in self._slots:
                self._slots[key] = Slots(self._decoder, *key)
            self._buckets[shape] = Bucket(self._decoder, shape, self._slots[key])
        bucket = self._buckets[shape]
        if bucket.graphs is None and self._room() < self._pass_bytes(shape) and self._pool is not None:
            self._forget_graphs()
        return bucket

    def _room(self) -> float:
        """Bytes of the device that are free for one more pass; without end on a CPU."""
        if self._device.type != "cuda":
            return math.inf
        total = torch.cuda.get_device_properties(self._device).total_memory
        limit = float(total * torch.cuda.get_per_process_memory_fraction(self._device))
        return limit - float(torch.cuda.memory_allocated(self._device)) - self._pool_bytes

    def _pass_bytes(self, shape: Shape) -> float:
        """What a pass that is not captured takes, or the capture of one, with what a step takes beside it."""
        tokens = shape.adapters * shape.rows * shape.length
        return SLACK * tokens * self._decoder.bytes_a_token + SPARE_BYTES

    def _needs(self, shape: Shape) -> float:
        """The same of a new bucket, with its slots."""
        slots = 0 if (shape.adapters, shape.rank) in self._slots else shape.adapters * self._slot_bytes(shape.rank)
        return self._pass_bytes(shape) + slots

    def _slot_bytes(self, rank: int) -> int:
        """Of one slot's weights and gradients."""
        numbers = sum(len(ends) * rank * (inputs + ends[-1]) for inputs, ends in self._decoder.shapes)
        return 2 * int(numbers) * len(self._decoder.layers) * int(self._decoder.embedding.element_size())

    def _forget_graphs(self) -> None:
        """The pool's memory is free again; every bucket is captured anew when it is used."""
        for bucket in self._buckets.values():
            bucket.graphs = None
        self._pool, self._pool_bytes = None, 0
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _drop(self) -> None:
        self._forget_graphs()
        self._buckets.clear()
        self._slots.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _prepare(self) -> None:
        """The thread that compiles, and captures what was used. What fails stays as it is, and is logged."""
        failed: set[Shape] = set()
        compiled = False
        while True:
            wanted = self._wanted.get()
            self._busy = True
            with self.lock:  # the step that asked has been handed over: compiling takes the interpreter from it
                pass
            started = monotonic()
            what: dict[str, Any] = {}
            try:
                if not compiled:
                    compiled = True
                    if self._cache is not None:
                        self._cache.load()
                    self._compile()
                if isinstance(wanted, LossBatch):
                    from claas_worker.sdpo_kernels import fused_score  # Triton is there where there is a GPU

                    wanted.try_out(score := fused_score())
                    self._scorers[wanted.key] = score
                    what = {"loss": str(wanted.key)}
                elif wanted not in failed:
                    what = wanted._asdict()
                    if not self._capture(wanted):
                        continue
                log.info("engine made ready", extra=what | {"seconds": round(monotonic() - started, 2)})
                if self._cache is not None and self._wanted.empty():
                    self._cache.save()
            except Exception as error:  # the plain way goes on working
                if isinstance(wanted, Shape):
                    failed.add(wanted)
                log.warning("engine stays as it is", extra=what | {"error": place(error)}, exc_info=True)
            finally:
                self._busy = False

    def _capture(self, shape: Shape) -> bool:
        """Whether there was something to capture."""
        with self.lock:
            bucket = self._buckets.get(shape)
            if bucket is None or bucket.graphs is not None:
                return False
            if self._room() < self._pass_bytes(shape):
                self._forget_graphs()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            self.current = None
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            bucket.capture(self.rows, self._pool)
            torch.cuda.empty_cache()
            self._pool_bytes += max(0, torch.cuda.memory_reserved() - before)
            return True

    def _compile(self) -> None:
        """Compiles every function on made-up rows, beside steps that run uncompiled; then puts them to use."""
        rows: Rows = Rows(compiled=True)
        update: Any = torch.compile(adamw)
        started = monotonic()
        compile_rows(self._decoder, rows)
        compile_update(update, self._device)
        with self.lock:
            self.rows, self.adamw = rows, update
        log.info("engine compiled", extra={"seconds": round(monotonic() - started, 2)})

    def _prove(self, model: Any) -> None:
        """Compares hidden states with the model's own.

        Raises:
            Unsupported: they differ.
        """
        embedding = self._decoder.embedding
        vocabulary = embedding.shape[0]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (2, PROOF_TOKENS), generator=generator).tolist()
        with torch.no_grad():
            expected = model.base_model(input_ids=torch.tensor(ids, device=self._device), use_cache=False)
        with self.lock:
            done = self.forward(ids, [None, None], keep=False)
            states = done.hidden.view(1, -1, LENGTHS[0], embedding.shape[1])[0, :2, :PROOF_TOKENS].float()
            self._drop()
        self._wanted = queue.SimpleQueue()  # nothing is compiled before there is work
        reference = expected.last_hidden_state.float()
        error = float(torch.linalg.vector_norm(states - reference) / torch.linalg.vector_norm(reference))
        tolerance = PROOF_TOLERANCE if embedding.dtype == torch.bfloat16 else EXACT_PROOF_TOLERANCE
        if not error <= tolerance:
            raise Unsupported(f"its hidden states differ from what is written out here by {error:.2g}")


def prove_a_layer(model: Any) -> None:
    """Compares the first layer and the final norm with the model's own, in fp32, at the first and the last positions.

    Raises:
        Unsupported: they differ, or the model is built in another way.
    """
    check(model)
    few, length = few_of(model, PROOF_TOKENS), PROOF_TOKENS
    tokens = few.embed_tokens.weight.shape[0]
    ids = torch.randint(0, tokens, (2, length), generator=torch.Generator().manual_seed(0))
    places = [0, max(0, getattr(model.config, "max_position_embeddings", 0) - length)]
    positions = torch.arange(length) + torch.tensor(places)[:, None]
    try:
        with torch.no_grad():
            expected = few(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.flatten(0, 1)
            decoder = Decoder(few)
            none = Slots(decoder, 1, 1)
            cos, sin = (
                torch.cat(one) for one in zip(*(decoder.angles(1, length, first) for first in places), strict=True)
            )
            states = decoder.forward(ids, (cos, sin), none.a, none.b, Rows(), None)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise Unsupported(f"its layers do not compute as what is written out here: {error}") from error
    distance = float(torch.linalg.vector_norm(states - expected) / torch.linalg.vector_norm(expected))
    if not distance <= EXACT_PROOF_TOLERANCE:
        raise Unsupported(f"a layer's hidden states differ from what is written out here by {distance:.2g}")


class CompileCache:
    """Inductor's and Triton's artifacts in one file, named by everything that they depend on.

    Whoever can write the folder can run code here: it is for a volume that only workers write.
    """

    def __init__(self, folder: Path, decoder: Decoder) -> None:
        sources = [Path(__file__).with_name(name).read_bytes() for name in COMPILED_SOURCES]
        device = torch.cuda.get_device_properties(0)
        facts = (torch.__version__, torch.version.cuda, device.name, decoder.shapes, decoder.embedding.dtype, sources)
        self._path = folder / f"claas-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.bin"
        self._size = 0

    def load(self) -> None:
        """Puts what is there at the compiler's disposal."""
        if self._path.is_file():
            content = self._path.read_bytes()
            self._size = len(content)
            found = torch.compiler.load_cache_artifacts(content)
            log.info("compile cache read", extra={"bytes": self._size, "usable": found is not None})

    def save(self) -> None:
        """Keeps what has been compiled so far, if it is more than what was there. A folder that cannot be written is
        no reason to stop."""
        saved = torch.compiler.save_cache_artifacts()
        if saved is None or len(saved[0]) <= self._size:
            return
        self._size = len(saved[0])
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            beside.write_bytes(saved[0])
            beside.replace(self._path)
        except OSError as error:
            log.warning("compile cache not written", extra={"why": type(error).__name__})
            return
        log.info("compile cache written", extra={"bytes": self._size})


def arrange(
    lengths: Sequence[int], adapters: Sequence[FlatState | None]
) -> tuple[Shape, list[int], list[FlatState | None]]:
    """The bucket for these sequences, the row of each, and the adapter in each slot.

    Adapters with as many rows each share slots; otherwise every row has a slot of its own, and one adapter may have
    several.
    """
    by_adapter: dict[int, list[int]] = {}
    for index, adapter in enumerate(adapters):
        by_adapter.setdefault(id(adapter), []).append(index)
    groups = list(by_adapter.values())
    if len({len(group) for group in groups}) > 1:
        groups = [[index] for index in range(len(adapters))]
    rank = max([adapter.layout.rank for adapter in adapters if adapter is not None], default=1)
    n, m = rounded(len(groups), COUNTS, COUNT_STEP), rounded(len(groups[0]), COUNTS, COUNT_STEP)
    shape = Shape(n, m, rounded(max(lengths), LENGTHS, LENGTH_STEP), rounded(rank, RANKS, RANKS[-1]))
    rows = [0] * len(lengths)
    slots: list[FlatState | None] = [None] * n
    for slot, group in enumerate(groups):
        slots[slot] = adapters[group[0]]
        for place_in_slot, index in enumerate(group):
            rows[index] = slot * m + place_in_slot
    return shape, rows, slots


def rounded(number: int, steps: Sequence[int], beyond: int) -> int:
    """The smallest step that is at least `number`; past the last, a multiple of `beyond`."""
    return next((step for step in steps if step >= number), -(-number // beyond) * beyond)


def compile_rows(decoder: Decoder, rows: Rows) -> None:
    """Calls every function of `rows` that this decoder uses, so that none is compiled later."""
    like, tokens = decoder.embedding, 256
    d, inner = like.shape[1], decoder.shapes[2][1][0]
    heads, kv, size = decoder.heads, decoder.kv_heads, decoder.head_dim

    def some(*shape: int) -> Tensor:
        tensor = torch.randn(tokens, *shape, device=like.device).to(like.dtype)
        torch._dynamo.mark_dynamic(tensor, 0)
        return tensor

    def wide(columns: int) -> Tensor:
        return some(columns + TAIL)

    with torch.no_grad():
        layer = decoder.layers[0]
        rows.norm(some(d), layer.norm_mlp, decoder.eps, wide(d))
        rows.add_norm(some(d), some(d), layer.norm_mlp, decoder.eps, wide(d))
        rows.norm_backward(some(d), some(d), layer.norm_mlp, decoder.eps, wide(d))
        rows.norm_backward_add(some(d), some(d), layer.norm_mlp, decoder.eps, wide(d), wide(d))
        rows.gate(some(2 * inner))
        rows.gate_backward(some(inner), some(2 * inner))
        qkv, angles = (heads + 2 * kv) * size, (some(size), some(size))
        turned = some(heads, size), some(kv, size), some(kv, size)
        if layer.norm_q is None:
            rows.rotate(some(qkv), *angles, heads, kv)
            rows.rotate_backward(*turned, *angles, wide(qkv))
        else:
            norms = (layer.norm_q, layer.norm_k, decoder.eps)
            rows.norm_rotate(some(qkv), *angles, heads, kv, *norms)
            rows.norm_rotate_backward(*turned, *angles, some(qkv), *norms, wide(qkv))


def compile_update(update: Callable[..., Tensor], device: torch.device) -> None:
    """The same for AdamW."""
    tensors = [torch.randn(64, ROW, device=device).abs() for _ in range(4)]
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0)
    update(*tensors, torch.ones(4, device=device))
