"""llama.cpp's C interface (its include/llama.h), in the library that the package xllamacpp brings: a model, and the
keys and values of several sequences of tokens.

Shapes: O tokens whose logits are asked for, V vocabulary.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int32, c_size_t, c_uint8, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heliostat import installed
from heliostat.generate import EngineFailed
from heliostat.recipe import GgufDtype

STEP_TOKENS = 512
"""Of all sequences together, in one forward pass."""
ERROR, F32, NO_FLASH_ATTENTION = 4, 0, 0
"""ggml_log_level, ggml_type, llama_flash_attn_type."""


class _ModelParams(Structure):
    """Taken as they are given: only large enough."""

    _fields_ = [("all", c_uint8 * 256)]


class _ContextParams(Structure):
    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("_unused", c_uint32 * 3),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("_kinds", c_int32 * 4),
        ("flash_attn_type", c_int32),
        ("_positions", c_float * 8),
        ("_callback", c_void_p * 2),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("_pointer", c_void_p),
        ("_abort", c_void_p * 2),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("_rest", c_uint8 * 128),
    ]


DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "flash_attn_type": -1,
    "type_k": 1,
    "type_v": 1,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
}
"""llama.cpp's own, by which it is seen that its fields lie where they are looked for."""


class _Batch(Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", c_void_p),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", c_void_p),
    ]


_SAID: deque[str] = deque(maxlen=3)


@ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
def _hear(level: int, text: bytes, _: object) -> None:
    if level >= ERROR and text.strip():
        _SAID.append(text.decode(errors="replace").strip())


@cache
def library() -> ctypes.CDLL:
    """Raises EngineFailed for a version whose interface is another."""
    folder = installed.folder("xllamacpp")
    assert folder is not None  # checked before
    (path,) = folder.glob("xllamacpp*.so")
    found = ctypes.CDLL(str(path))
    for name, result, *arguments in (
        ("llama_model_default_params", _ModelParams),
        ("llama_context_default_params", _ContextParams),
        ("llama_model_load_from_file", c_void_p, c_char_p, _ModelParams),
        ("llama_model_free", None, c_void_p),
        ("llama_init_from_model", c_void_p, c_void_p, _ContextParams),
        ("llama_free", None, c_void_p),
        ("llama_n_ctx_seq", c_uint32, c_void_p),
        ("llama_n_seq_max", c_uint32, c_void_p),
        ("llama_get_memory", c_void_p, c_void_p),
        ("llama_memory_seq_rm", c_bool, c_void_p, c_int32, c_int32, c_int32),
        ("llama_memory_seq_cp", None, c_void_p, c_int32, c_int32, c_int32, c_int32),
        ("llama_state_seq_get_size", c_size_t, c_void_p, c_int32),
        ("llama_state_seq_get_data", c_size_t, c_void_p, c_void_p, c_size_t, c_int32),
        ("llama_state_seq_set_data", c_size_t, c_void_p, c_void_p, c_size_t, c_int32),
        ("llama_decode", c_int32, c_void_p, _Batch),
        ("llama_get_logits", POINTER(c_float), c_void_p),
        ("llama_log_set", None, c_void_p, c_void_p),
        ("llama_backend_init", None),
    ):
        function: Any = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    parameters = found.llama_context_default_params()
    if unlike := [name for name, value in DEFAULTS.items() if getattr(parameters, name) != value]:
        raise EngineFailed(
            f"this version of xllamacpp has another llama_context_params (at {', '.join(unlike)}); "
            "install the one of requirements.lock"
        )
    found.llama_log_set(ctypes.cast(_hear, c_void_p), None)
    found.llama_backend_init()
    return found


class Llama:
    """Not for several threads at once."""

    def __init__(
        self, file: Path, dtype: GgufDtype, vocab_size: int, *, tokens: int, sequences: int, threads: int | None
    ) -> None:
        """`dtype`: of the file. `tokens`: places for keys and values, of all sequences together. `sequences`: at most
        so many, numbered from 0. `threads`: that compute (None: one for each processor). Raises EngineFailed."""
        self._library, self._model, self._context = library(), None, None
        self._vocab_size = vocab_size
        _SAID.clear()
        self._model = self._library.llama_model_load_from_file(
            os.fsencode(file), self._library.llama_model_default_params()
        )
        if self._model:
            parameters = self._library.llama_context_default_params()
            parameters.n_ctx, parameters.n_seq_max, parameters.kv_unified = tokens, sequences, True
            parameters.n_batch = parameters.n_ubatch = STEP_TOKENS
            parameters.n_threads = parameters.n_threads_batch = threads or os.cpu_count() or 1
            if dtype == "f32":
                parameters.type_k = parameters.type_v = F32
                parameters.flash_attn_type = NO_FLASH_ATTENTION  # it computes in half precision
            self._context = self._library.llama_init_from_model(self._model, parameters)
        if not self._context:
            self.close()
            raise EngineFailed(f"llama.cpp does not start with {file}: {' '.join(_SAID)}")
        found = self._library.llama_n_ctx_seq(self._context), self._library.llama_n_seq_max(self._context)
        if found[0] < tokens or found[1] < sequences:
            self.close()
            raise EngineFailed(f"llama.cpp was asked for {tokens} tokens of {sequences} sequences, and has {found}")
        self._memory = self._library.llama_get_memory(self._context)
        self._rows: list[tuple[int, int, int, bool]] = []
        """Of the next step: token, position, sequence, whether its logits are wanted."""
        self._values = [np.zeros(STEP_TOKENS, kind) for kind in (np.int32, np.int32, np.int32, np.int8)]
        token, position, sequence, asked = (values.ctypes.data for values in self._values)
        self._ones = np.ones(STEP_TOKENS, np.int32)  # each token is of one sequence
        self._pointers = np.arange(sequence, sequence + 4 * STEP_TOKENS, 4, dtype=np.uintp)
        ones, pointers = self._ones.ctypes.data, self._pointers.ctypes.data
        self._batch = _Batch(0, token, None, position, ones, pointers, asked)

    def add(self, sequence: int, begin: int, tokens: Sequence[int], asked: range) -> None:
        """To the next step: `tokens` at the positions from `begin` on. `asked`: those of them, by position, whose
        logits are wanted."""
        self._rows += [(token, place, sequence, place in asked) for place, token in enumerate(tokens, begin)]

    def step(self) -> Tensor:
        """(O, V) Logits, in the order of `add`, until the next step. Raises EngineFailed."""
        columns = [*zip(*self._rows, strict=True)]
        count, rows = len(self._rows), sum(columns[3])
        for values, column in zip(self._values, columns, strict=True):
            values[:count] = column
        self._batch.n_tokens, self._rows = count, []
        _SAID.clear()
        if status := self._library.llama_decode(self._context, self._batch):
            raise EngineFailed(f"llama.cpp cannot go on (llama_decode: {status}) {' '.join(_SAID)}")
        if not rows:
            return torch.empty(0, self._vocab_size)
        logits = self._library.llama_get_logits(self._context)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (rows, self._vocab_size)))

    def share(self, sequence: int, other: int, length: int) -> None:
        """`other`, which is empty, begins with the first `length` tokens of a sequence: they take no place of their
        own."""
        self._library.llama_memory_seq_cp(self._memory, sequence, other, 0, length)

    def copy(self, sequence: int) -> np.ndarray:
        """Its keys and values, for `restore`."""
        found = np.empty(self._library.llama_state_seq_get_size(self._context, sequence), np.uint8)
        self._library.llama_state_seq_get_data(self._context, found.ctypes.data, found.size, sequence)
        return found

    def restore(self, sequence: int, copied: np.ndarray, length: int) -> bool:
        """Whether there was room for what was copied; the first `length` tokens are kept of it. The sequence is empty
        before, and where there was none."""
        size = self._library.llama_state_seq_set_data(self._context, copied.ctypes.data, copied.size, sequence)
        if size and self._library.llama_memory_seq_rm(self._memory, sequence, length, -1):
            return True
        self.forget(sequence)
        return False

    def forget(self, sequence: int) -> None:
        self._library.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def close(self) -> None:
        if self._context:
            self._library.llama_free(self._context)
        if self._model:
            self._library.llama_model_free(self._model)
        self._context = self._model = None
