"""Runs llama.cpp in a process of its own, which may crash: a program, started by llama_process.py.

It imports nothing of offramp. Each line of standard input is a request in JSON, and each line of
standard output is its answer. What the native library prints goes nowhere.
"""

import ctypes
import json
import os
import sys
import time
from typing import Any

import numpy as np

FILE_TYPES = {
    "f32": "LLAMA_FTYPE_ALL_F32",
    "bf16": "LLAMA_FTYPE_MOSTLY_BF16",
    "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
    "q4_1": "LLAMA_FTYPE_MOSTLY_Q4_1",
}
_ERROR = 4  # the level of an error in llama.cpp's log


class Server:
    """Answers requests with one model of llama.cpp."""

    def __init__(self) -> None:
        import llama_cpp

        self.lib: Any = llama_cpp
        self.said: list[str] = []
        self.log = llama_cpp.llama_log_callback(self._log)  # kept, because the library calls it
        llama_cpp.llama_log_set(self.log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model: Any = None
        self.context: Any = None
        self.vocab_size = 0

    def _log(self, level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            self.said.append(text.decode(errors="replace").strip())

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request, whose ``do`` is the name of a method below."""
        arguments = dict(request)
        answer: dict[str, Any] = getattr(self, f"do_{arguments.pop('do')}")(**arguments)
        return answer

    def do_describe(self, gguf: str) -> dict[str, Any]:
        """Return the vocabulary and shape of a file, without its weights."""
        lib = self.lib
        model = self._loaded(gguf, vocab_only=True)
        vocab = lib.llama_model_get_vocab(model)
        texts = [
            (lib.llama_vocab_get_text(vocab, token) or b"").decode(errors="replace")
            for token in range(lib.llama_vocab_n_tokens(vocab))
        ]
        kind = self._meta(model, "general.architecture")
        about = {
            "tokens": texts,
            "layers": self._meta(model, f"{kind}.block_count"),
            "width": self._meta(model, f"{kind}.embedding_length"),
            "file_type": self._meta(model, "general.file_type"),
            "own_head": _has_own_head(gguf),
        }
        lib.llama_model_free(model)
        return about

    def do_quantise(self, gguf: str, out: str, kind: str, threads: int) -> dict[str, Any]:
        """Write the model of a file in another weight format."""
        options = self.lib.llama_model_quantize_default_params()
        options.ftype = getattr(self.lib, FILE_TYPES[kind])
        options.allow_requantize = True
        options.nthread = threads
        code = self.lib.llama_model_quantize(
            os.fsencode(gguf), os.fsencode(out), ctypes.byref(options)
        )
        if code != 0:
            raise RuntimeError(self._why(f"llama_model_quantize returned {code}"))
        return {}

    def do_load(self, gguf: str, threads: int, length: int, rows: int) -> dict[str, Any]:
        """Load a model, to run up to ``rows`` texts of up to ``length`` tokens together."""
        lib = self.lib
        self.model = self._loaded(gguf)
        options = lib.llama_context_default_params()
        options.n_ctx = (length + 255) // 256 * 256 * rows
        options.n_batch = length * rows
        options.n_seq_max = rows
        options.n_threads = options.n_threads_batch = threads
        options.no_perf = True
        self.context = lib.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(self._why("llama_init_from_model failed"))
        self.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        return {"bytes": lib.llama_model_size(self.model)}

    def do_decode(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Decode greedily; no token ends a text. Times are as in ``methods.Sample``."""
        rows = range(len(prompts))
        batch = self._batch(prompts, every=False)
        last = [sum(map(len, prompts[: row + 1])) - 1 for row in rows]
        step = self.lib.llama_batch_init(len(prompts), 0, 1)
        step.n_tokens = len(prompts)
        tokens: list[list[int]] = [[] for _ in rows]
        self._clear()
        start = time.perf_counter()
        self._run(batch)
        places, first = last, 0.0
        for count in range(new):
            for row in rows:
                token = int(self._logits(places[row], 1)[0].argmax())
                tokens[row].append(token)
                self._put(step, row, token, len(prompts[row]) + count, row, wanted=True)
            first = first or time.perf_counter()
            if count + 1 < new:
                self._run(step)
                places = list(rows)
        end = time.perf_counter()
        self.lib.llama_batch_free(batch)
        self.lib.llama_batch_free(step)
        return {"tokens": tokens, "first_seconds": first - start, "seconds": end - first}

    def do_losses(self, inputs: list[int], targets: list[int]) -> dict[str, Any]:
        """Return the summed losses, in nats, of the targets of the last inputs of one window."""
        batch = self._batch([inputs], every=True)
        self._clear()
        self._run(batch)
        self.lib.llama_batch_free(batch)
        logits = self._logits(0, len(inputs), whole=True)[-len(targets) :]
        most = logits.max(axis=1)
        total = np.log(np.exp(logits - most[:, None]).sum(axis=1, dtype=np.float64)) + most
        losses = total - logits[np.arange(len(targets)), targets]
        return {"nll": float(losses.sum()), "count": len(targets)}

    def _loaded(self, gguf: str, **options: Any) -> Any:
        chosen = self.lib.llama_model_default_params()
        for name, value in options.items():
            setattr(chosen, name, value)
        model = self.lib.llama_model_load_from_file(os.fsencode(gguf), chosen)
        if not model:
            raise RuntimeError(self._why("the file cannot be loaded"))
        return model

    def _meta(self, model: Any, key: str) -> str:
        value = ctypes.create_string_buffer(256)
        got = self.lib.llama_model_meta_val_str(model, key.encode(), value, len(value))
        return value.value.decode(errors="replace") if got >= 0 else ""

    def _why(self, otherwise: str) -> str:
        return self.said[0] if self.said else otherwise

    def _batch(self, texts: list[list[int]], *, every: bool) -> Any:
        """Return a batch with a row for each text; logits of every token, or of the last ones."""
        batch = self.lib.llama_batch_init(sum(map(len, texts)), 0, 1)
        place = 0
        for row, text in enumerate(texts):
            for position, token in enumerate(text):
                wanted = every or position == len(text) - 1
                self._put(batch, place, token, position, row, wanted=wanted)
                place += 1
        batch.n_tokens = place
        return batch

    @staticmethod
    def _put(batch: Any, place: int, token: int, position: int, row: int, *, wanted: bool) -> None:
        batch.token[place] = token
        batch.pos[place] = position
        batch.n_seq_id[place] = 1
        batch.seq_id[place][0] = row
        batch.logits[place] = wanted

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def _run(self, batch: Any) -> None:
        code = self.lib.llama_decode(self.context, batch)
        if code != 0:
            raise RuntimeError(self._why(f"llama_decode returned {code}"))

    def _logits(self, place: int, count: int, *, whole: bool = False) -> Any:
        """Return logits (count, V): of the batch's token at ``place``, or of the whole batch."""
        found = (
            self.lib.llama_get_logits(self.context)
            if whole
            else self.lib.llama_get_logits_ith(self.context, place)
        )
        return np.ctypeslib.as_array(found, shape=(count, self.vocab_size))


def _has_own_head(gguf: str) -> bool:
    """Whether the file has an LM head beside the input embeddings, which are never read whole."""
    from gguf import GGUFReader

    return any(tensor.name == "output.weight" for tensor in GGUFReader(gguf).tensors)


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    server: Server | None = None
    for line in sys.stdin:
        try:
            server = server or Server()
            answer = server.answer(json.loads(line))
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            answer = {"error": said, "imported": server is not None}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
