"""Real teacher rows to measure cache layouts on: SmolLM2-135M-Instruct reading Python's own text.

One idea: windows are made once, one file each, under `.cache/`, so a first run makes as many as it
has time for and later ones add to them. Nothing here encodes anything.
"""

import json
import random
import sysconfig
import time
from pathlib import Path

import numpy as np

from stillroom.pipeline.planning.distortion import drawn

LENGTH = 1024
TOP = 256
HIDDEN_LAYERS = (8, 15, 22, "final")
HIDDEN_WINDOWS = 6
FOLDER = Path(".cache/benchmarks/teacher-windows")


def windows(model: str, count: int, seconds: float) -> list[dict[str, np.ndarray]]:
    """Up to `count` windows of `LENGTH` rows, of which new ones are made for at most `seconds`."""
    folder = FOLDER / Path(model).name
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:04d}.npz" for number in range(count)]
    missing = [path for path in paths if not path.exists()]
    if missing:
        _make(model, missing, time.monotonic() + seconds)
    return [dict(np.load(path)) for path in paths if path.exists()]


def vocab_size(model: str) -> int:
    """Rows of a model's head."""
    return json.loads(Path(model, "config.json").read_text())["vocab_size"]


def row_signals(
    window: dict[str, np.ndarray], k: int, draws: int = 0, scalars: bool = False
) -> dict[str, np.ndarray]:
    """The signals of a record with lists of `k`, as a capture would give them."""
    logprobs = window["logprobs"]
    tail = np.exp(logprobs[:, k:], dtype=np.float64)
    outside = tail.sum(axis=1) + window["beyond"]
    signals = {
        "topk_ids": np.ascontiguousarray(window["ids"][:, :k]),
        "topk_logprobs": np.ascontiguousarray(logprobs[:, :k]),
        "tail_logprob": np.log(np.maximum(outside, 1e-12)).astype(np.float32),
        "token_ids": window["tokens"],
    }
    if draws:
        rng = np.random.default_rng(0)
        signals |= drawn(window["ids"][:, k:], tail, outside, draws, window["far"], rng)
    if scalars:
        signals |= {n: window[n] for n in ("token_logprob", "token_rank", "entropy", "lse")}
    return signals


def hidden_states(window: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """float32 [LENGTH, width] per layer; empty where a window has none."""
    if "hidden" not in window:
        return {}
    floats = (window["hidden"].astype(np.uint32) << 16).view(np.float32)
    return {f"layer {layer}": floats[i] for i, layer in enumerate(HIDDEN_LAYERS)}


def texts() -> tuple[str, str]:
    """(Python's topic documentation, a few dozen modules of its library)."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_paths()["stdlib"])
    names = [name for part in ("*.py", "asyncio/*.py", "email/*.py") for name in library.glob(part)]
    names.sort()
    random.Random(0).shuffle(names)
    modules = [name.read_text(errors="replace") for name in names[:40]]
    return "\n\n".join(topics[name] for name in sorted(topics)), "\n\n".join(modules)


def _make(model: str, paths: list[Path], deadline: float) -> None:
    import torch

    import stillroom.pipeline  # noqa: F401  (torch's CPU build beside CUDA wheels)

    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prose, code = (np.array(tokenizer(text)["input_ids"], dtype=np.int32) for text in texts())
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    for path in paths:
        number = int(path.stem)
        source, place = (code, number // 3) if number % 3 == 2 else (prose, number - number // 3)
        tokens = source[place * (LENGTH + 1) : (place + 1) * (LENGTH + 1)]
        if len(tokens) <= LENGTH or time.monotonic() > deadline:
            return
        with torch.inference_mode():
            arrays = _score(network, tokens, hidden=number < HIDDEN_WINDOWS)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **arrays)
        partial.rename(path)


def _score(network, tokens: np.ndarray, hidden: bool) -> dict[str, np.ndarray]:
    import torch

    inputs = torch.from_numpy(tokens[:-1].astype(np.int64))[None]
    out = network.model(inputs, output_hidden_states=hidden, use_cache=False)
    logits = out.last_hidden_state[0].float() @ network.lm_head.weight.float().T
    lse = logits.logsumexp(-1)
    logp = logits - lse[:, None]
    values, ids = logp.topk(TOP)
    following = torch.from_numpy(tokens[1:].astype(np.int64))[:, None]
    token = logp.gather(1, following)
    arrays = {
        "tokens": tokens,
        "ids": ids.int(),
        "logprobs": values,
        "beyond": (1 - values.double().exp().sum(-1)).clamp(min=1e-9),
        "far": logits.mean(0).argsort()[: logits.shape[1] // 2].int(),
        "entropy": -(logp.exp() * logp).sum(-1),
        "lse": lse[:, None],
        "token_logprob": token[:, 0],
        "token_rank": 1 + (logp > token).sum(-1).int(),
    }
    if hidden:
        states = [out.hidden_states[n] for n in HIDDEN_LAYERS[:-1]] + [out.last_hidden_state]
        bits = torch.stack([state[0].bfloat16().view(torch.int16) for state in states])
        arrays["hidden"] = bits.numpy().view(np.uint16)
    return {name: np.asarray(array) for name, array in arrays.items()}
