"""The CPU kernels of ``native.c`` and its neighbours: compiled once with the machine's C compiler,
called by ctypes.

Each operator here has its definition in plain torch and uses the kernel where it can: float32
activations on the CPU, and a compiler found. ``status()`` says which runs and why.
``NARROWS_NATIVE=0`` turns the kernels off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import platformdirs
import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear
from torch.nn.functional import silu

from narrows.ops.rotary import turn

KERNELS = (
    *("native", "ragged", "packed", "fold", "cover", "bytes", "forecast", "flash", "decoder"),
    "ngrams",
)
SOURCES = tuple(Path(__file__).with_name(f"{x}.c") for x in KERNELS)
HEADERS = tuple(Path(__file__).with_name(x) for x in ("vector.h", "tiles.h"))
FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=gnu11"),
    # NaN and infinity keep their meaning, and sums their order where the source does not say.
    *("-fno-math-errno", "-fno-trapping-math"),
)
P, L, F, N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
SIGNATURES = {
    "bf16_dots": (N, ()),
    "linear_few": (None, (P, P, P, P, L, L, L, N)),
    "on_tiles": (N, (L, L)),
    "linear_maxima": (None, (P, P, P, P, P, L, L, L, N)),
    "linear_bytes": (None, (P, P, P, P, L, L, L, N)),
    "absorb_room": (L, (P, L)),
    "absorb": (N, (P, L, P, P, P, N, P, P, N)),
    "forecast_room": (L, (P, L)),
    "forecast": (None, (P, L, P, P, P, L, F, P, P, P, N)),
    "before_attention": (None, (P, P, P, P, P, P, P, L, N)),
    "after_attention": (None, (P, P, P, P, P, P, L, N)),
    "decode_room": (L, (P, L, L)),
    "decode": (N, (P, L, P, P, P, P, P, P, P, P, N, P, L, P, L, P, L, N)),
    "add_rms_norm": (None, (P, P, N, P, F, P, N, L, L, N)),
    "row_maxima": (None, (P, L, L, P, P, N)),
    "gather_rows": (N, (P, N, L, L, P, L, P)),
    "norm_rotate": (None, (P, L, L, L, P, F, P, P, L, N)),
    "silu_mul": (None, (P, P, L, L, N)),
    "silu_mul_bf16": (None, (P, P, L, L, N)),
    "softmax_mass": (None, (P, N, L, L, L, L, L, L, P, P, N)),
    "packed_int8": (N, ()),
    "attend_packed": (N, (P, L, P, L, P, L, P, L, P, L, L, L, L, F, N, N, N)),
    "fold_value": (N, (P, N, L, L, L, L, L, N, F, F, P, L, P, P, L, N, L)),
    "flash_ready": (N, ()),
    "flash_room": (L, (L, L, L, L)),
    "flash_mass_room": (L, (L, L, N)),
    "flash": (None, (P, L, P, L, P, L, P, L, L, L, L, L, L, F, L, P, L, L, L, N, P, P, N)),
    "likeness_room": (L, (L, L)),
    "likeness": (None, (P, L, L, F, P, P, N)),
    "nearest": (None, (P, L, P, L, L, P, P, P, N)),
    "greedy_cover": (L, (P, L, P, N, P, P, P, N)),
    "repeats": (None, (P, L, L, L, L, L, P)),
    "phrases": (None, (P, P, L, L, L, F, P)),
    "append_attend": (N, (P, L, P, L, P, L, P, L, P, L, L, L, L, F, N, N)),
}


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("NARROWS_NATIVE") == "0":
        return None, "turned off by NARROWS_NATIVE=0"
    compiler = shutil.which(os.environ.get("CC") or "gcc") or shutil.which("cc")
    if compiler is None:
        return None, "no C compiler found; install gcc for faster decoding"
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        told = next((x for x in lines if "error" in x), lines[-1])
        return None, f"compiling failed: {told}"
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library, f"compiled with {Path(compiler).name}"


def _compiled(compiler: str) -> Path:
    """The shared library for these sources, compiler, processor and torch; built if need be."""
    openmp = next((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"), None)
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    texts = [x.read_text() for x in (*SOURCES, *HEADERS)]
    parts = (*texts, version.stdout, _processor(), str(FLAGS), str(openmp))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = os.environ.get("NARROWS_CACHE") or platformdirs.user_cache_dir("narrows")
    target = Path(cache) / "native" / f"{key}{sysconfig.get_config_var('SHLIB_SUFFIX')}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            made = [str(Path(folder) / f"{x.stem}.o") for x in SOURCES]
            # torch's own OpenMP runtime, so that both share one pool of threads.
            runtime = [str(openmp)] if openmp else ["-fopenmp"]
            for command in (
                *(
                    [compiler, *FLAGS, "-c", str(x), "-o", o]
                    for x, o in zip(SOURCES, made, strict=True)
                ),
                [compiler, "-shared", *made, "-o", str(built), *runtime, "-lm"],
            ):
                subprocess.run(command, capture_output=True, text=True, check=True)
            os.replace(built, target)
    return target


def _processor() -> str:
    """What ``-march=native`` depends on; a cache folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform()
    return "\n".join(dict.fromkeys(x for x in lines if x.startswith(("model name", "flags"))))


def status() -> str:
    """Which implementation runs and why, in a few words."""
    library, reason = _load()
    return f"{'native' if library else 'torch'} ({reason})"


def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None; see ``status``."""
    return _load()[0]


def wide_matmul_dtype() -> torch.dtype:
    """In which precision this CPU multiplies large matrices fastest: bfloat16 where it has units
    for it, else float32 (a processor without them is several times slower in bfloat16)."""
    return torch.bfloat16 if _has_bf16_units() else torch.float32


def attention_dtype(q: Tensor, stored: torch.dtype) -> torch.dtype:
    """In which precision many rows of ``q`` attend to keys and values of a cache that holds
    ``stored``: q's own, or the cache's where this CPU multiplies that faster."""
    if q.device.type == "cpu" and stored is torch.bfloat16:
        return wide_matmul_dtype()
    return q.dtype


def flash_is_slow(dtype: torch.dtype) -> bool:
    """Whether torch's flash attention is slow in ``dtype`` on this CPU, which has units for it: it
    multiplies bfloat16 fast only on AMX tiles."""
    units = dtype is torch.bfloat16 and wide_matmul_dtype() is torch.bfloat16
    return units and library() is not None and not torch.cpu._is_amx_tile_supported()


@functools.cache
def _has_bf16_units() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


TILE_ROWS = 16
"""Rows of an AMX tile."""
KERNEL_ROWS, DOT_ROWS, TILED_ROWS = 64, 256, 1536
"""Above this many rows, by units for products of bfloat16 pairs and on tiles if there are any,
oneDNN and MKL win."""


@functools.cache
def _kernel_rows(native: ctypes.CDLL | None, outer: int, inner: int) -> int:
    """Rows up to which a bfloat16 weight ``[outer, inner]`` is multiplied by a kernel of ours."""
    if native is None:
        return 0
    if native.on_tiles(outer, inner):
        return TILED_ROWS
    return DOT_ROWS if native.bf16_dots() else KERNEL_ROWS


def few_rows(rows: int, weight: Tensor) -> bool:
    """Whether so many rows are multiplied with ``weight`` by a kernel of ours."""
    if weight.dtype is not torch.bfloat16 or weight.device.type != "cpu":
        return False
    return rows <= _kernel_rows(library(), *weight.shape)


def rows_at_once(weight: Tensor) -> int:
    """How many rows, few of them, are multiplied with ``weight`` in about the time of one."""
    native = library()
    if native is None or not few_rows(1, weight) or not native.on_tiles(*weight.shape):
        return 1
    return TILE_ROWS


def flow_dtype(rows: int, weight: Tensor) -> torch.dtype:
    """In which precision ``rows`` activations go into and come out of products with ``weight``:
    bfloat16 where those are done in it anyway, which saves converting, else float32."""
    if weight.dtype is torch.bfloat16 and rows > _kernel_rows(library(), *weight.shape):
        return wide_matmul_dtype()
    return torch.float32


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, room: Tensor | None = None
) -> Tensor:
    """``x`` ``[m, k]`` times ``weight`` ``[n, k]`` transposed, plus ``bias`` float32 ``[n]`` ->
    ``[m, n]`` in x's dtype, which is float32, or bfloat16 as the weight's. A bfloat16 weight is
    read as it is, never rounded again. Where ``few_rows`` says so, it is made in ``room``, float32,
    if that is large enough: what is made anew each time may have to be cleared page by page."""
    if weight.dtype == x.dtype:
        return torch_linear(x, weight, None if bias is None else bias.to(x.dtype))
    rows, inner = x.shape
    outer = weight.shape[0]
    native = library()
    if native is not None and few_rows(rows, weight):
        x = x.contiguous()
        if room is not None and room.dtype is x.dtype and room.numel() >= rows * outer:
            out = room.view(-1)[: rows * outer].view(rows, outer)
        else:
            out = x.new_empty((rows, outer))
        native.linear_few(
            *(x.data_ptr(), weight.data_ptr(), _pointer(bias), out.data_ptr()),
            *(rows, outer, inner, torch.get_num_threads()),
        )
        return out
    if weight.dtype == torch.bfloat16 and wide_matmul_dtype() is torch.bfloat16:
        out = torch_linear(x.bfloat16(), weight).float()
    else:
        out = torch_linear(x, weight.float())
    return out if bias is None else out.add_(bias)


def add_rms_norm(
    h: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: torch.dtype = torch.float32
) -> Tensor:
    """Add ``delta`` to ``h`` in place (float32 ``[m, n]``; delta may be bfloat16), then return
    ``h`` over its root mean square, times ``weight`` float32 ``[n]``, in dtype ``out``."""
    native = library()
    if native is None:
        if delta is not None:
            h += delta
        return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight).to(out)
    result = torch.empty_like(h, dtype=out)
    native.add_rms_norm(
        *(h.data_ptr(), _pointer(delta), delta is not None and delta.dtype is torch.bfloat16),
        *(weight.data_ptr(), eps, result.data_ptr(), out is torch.bfloat16),
        *(*h.shape, torch.get_num_threads()),
    )
    return result


def row_maxima(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x.max(dim=1)`` of float32 ``[m, n]``: the greatest of each row, NaN above all, and the
    first place where it stands."""
    native = library()
    if native is None or x.device.type != "cpu" or not x.is_contiguous():
        best = x.max(dim=1)
        return best.values, best.indices
    values, places = x.new_empty(len(x)), x.new_empty(len(x), dtype=torch.int64)
    native.row_maxima(
        *(x.data_ptr(), *x.shape, values.data_ptr(), places.data_ptr(), torch.get_num_threads())
    )
    return values, places


def linear_maxima(x: Tensor, weight: Tensor, room: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``row_maxima(linear(x, weight, room=room))``, to the bit, where that is faster without making
    the product."""
    native, (rows, inner), outer = library(), x.shape, len(weight)
    known = x.dtype is torch.float32 and few_rows(rows, weight)
    if native is None or not known or not native.on_tiles(outer, inner):
        return row_maxima(linear(x, weight, room=room))
    threads = torch.get_num_threads()
    values, places = x.new_empty(rows), x.new_empty(rows, dtype=torch.int64)
    found = x.new_empty(threads * -(-rows // TILE_ROWS) * 2 * TILE_ROWS)
    native.linear_maxima(
        *(x.contiguous().data_ptr(), weight.data_ptr(), values.data_ptr(), places.data_ptr()),
        *(found.data_ptr(), rows, outer, inner, threads),
    )
    return values, places


def gather_rows(table: Tensor, at: Tensor) -> Tensor:
    """Rows ``at`` int64 ``[m]`` of ``table`` ``[n, k]``: float32 ``[m, k]``. Raises IndexError if
    one of them is not in it."""
    native = library()
    known = table.dtype in (torch.float32, torch.bfloat16) and at.dtype is torch.int64
    if native is None or table.device.type != "cpu" or not known:
        if len(at) and not 0 <= int(at.min()) <= int(at.max()) < len(table):
            raise IndexError(OUTSIDE)
        return table[at].float()
    at, out = at.contiguous(), at.new_empty((len(at), table.shape[1]), dtype=torch.float32)
    if native.gather_rows(
        *(table.data_ptr(), table.dtype is torch.bfloat16, *table.shape),
        *(at.data_ptr(), len(at), out.data_ptr()),
    ):
        raise IndexError(OUTSIDE)
    return out


OUTSIDE = "a row was asked for that the table does not have"


def norm_rotate_(
    x: Tensor, weight: Tensor | None, eps: float, cosine: Tensor, sine: Tensor
) -> None:
    """In place on ``x`` float32 ``[m, heads, dim]`` (rows may be strided): each head vector over
    its root mean square times ``weight`` ``[dim]`` (if given), then rotary embedding by
    ``cosine``, ``sine`` float32 ``[m, dim]`` (halves rotated against each other)."""
    m, heads, dim = x.shape
    native = library()
    if native is None:
        if weight is not None:
            x *= torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
        x.copy_(turn(x, cosine, sine))
        return
    native.norm_rotate(
        *(x.data_ptr(), x.stride(0), heads, dim, _pointer(weight), eps),
        *(cosine.data_ptr(), sine.data_ptr(), m, torch.get_num_threads()),
    )


def silu_mul(gate_up: Tensor) -> Tensor:
    """``gate_up`` float32 or bfloat16 ``[m, 2 n]`` -> ``silu(first half) * second half``
    ``[m, n]``, computed in float32, in the same dtype."""
    m, n = gate_up.shape[0], gate_up.shape[1] // 2
    native = library()
    if native is None:
        return (silu(gate_up[:, :n].float()) * gate_up[:, n:]).to(gate_up.dtype)
    out = gate_up.new_empty((m, n))
    kernel = native.silu_mul_bf16 if gate_up.dtype is torch.bfloat16 else native.silu_mul
    kernel(gate_up.data_ptr(), out.data_ptr(), m, n, torch.get_num_threads())
    return out


def softmax_mass_(
    scores: Tensor, folded: int, offset: int, window: int | None, mass: Tensor | None = None
) -> None:
    """Scores ``[groups, rows, seen]`` to causal softmax weights in place, float32 or bfloat16.

    ``folded`` rows in turn belong to one query, the first of which stands at key ``offset``; a
    query sees at most ``window`` keys, its own included. ``mass`` float32 ``[seen]``, if given,
    gains the column sums, taken in float32 before any rounding.
    """
    groups, rows, seen = scores.shape
    native = library()
    fast = scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.bfloat16)
    if native is None or not fast:
        at = offset + torch.arange(rows, device=scores.device)[:, None] // folded
        key = torch.arange(seen, device=scores.device)
        hidden = key > at if window is None else (key > at) | (key <= at - window)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32)
        if mass is not None:
            mass += weights.sum((0, 1))
        scores.copy_(weights)
        return
    threads = torch.get_num_threads()
    parts = None if mass is None else torch.empty(threads * seen)
    native.softmax_mass(
        *(scores.data_ptr(), scores.dtype is torch.bfloat16, groups, rows, folded, seen, offset),
        *(window or 0, _pointer(mass), _pointer(parts), threads),
    )


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
