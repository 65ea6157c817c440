"""The LM head of a transformers model as a formula, measured on the model itself.

One idea: a model's final state is what its head's matrix is multiplied with, whatever the model
calls it, and what happens to the product afterwards is found by putting chosen numbers in its
place and looking at the logits that come out: a factor (Granite, Cohere, Falcon-H1), a soft cap
(Gemma 2), both, or neither. A head of another kind is refused, never approximated.
Names of models and of their config keys are not read here.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from stillroom.cache_schemas.errors import TeacherError
from stillroom.pipeline.teacher.reference.parts import decoder_of

NUM_TOKENS = 6
SMALLEST, LARGEST = 1e-4, 1e6
"""Products put in: a cap c is told from a factor if it lies far from both (those known: 15-50)."""
RELATIVE = {torch.float32: 1e-4, torch.float64: 1e-4}
HALF_RELATIVE = 2e-2
"""What rounding may change of the largest value: sums of thousands of terms with 24 or 8 bits."""


@dataclass(frozen=True, slots=True)
class Head:
    """An LM head: logits = softcap(scale * hidden @ weight.T + bias).

    Attributes:
        weight: [V, D].
        bias: [V] or None.
        softcap: c of c * tanh(z / c), or None.
        scale: factor that some architectures put on the product.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] of final states [N, D]."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        product = nn.functional.linear(hidden * self.scale, self.weight.to(hidden.dtype), bias)
        return product if self.softcap is None else self.softcap * (product / self.softcap).tanh()

    def to(self, device: torch.device | str) -> "Head":
        """The same on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return Head(self.weight.to(device), bias, self.softcap, self.scale)


@dataclass(frozen=True, slots=True)
class HeadForm:
    """What is not in the head's own weights.

    Attributes:
        state: factor from the decoder's last state to what the head reads (MiniCPM); None where
            that is no factor.
        scale: factor on the product.
        softcap: of the logits, or None.
    """

    state: float | None
    scale: float
    softcap: float | None


def head_of(model: Any) -> Head:
    """The model's head; its final states are what `WatchedHead` collects."""
    head, form = model.get_output_embeddings(), form_of(model)
    bias = getattr(head, "bias", None)
    bias = bias if bias is None or form.scale == 1.0 else bias * form.scale
    return Head(head.weight, bias, form.softcap, form.scale)


_FORMS: WeakKeyDictionary[nn.Module, HeadForm] = WeakKeyDictionary()


def form_of(model: Any) -> HeadForm:
    """Measure a model's head, once for each model.

    Raises:
        TeacherError: its logits are not a capped linear function of a state.
    """
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise _unfit(model, "has no matrix that its logits are made with")
    if head not in _FORMS:
        _FORMS[head] = measured_form(model)
    return _FORMS[head]


def measured_form(model: Any) -> HeadForm:
    """`form_of` as the model is now, whatever was measured before."""
    head, was_training = model.get_output_embeddings(), model.training
    try:
        with torch.no_grad(), torch.autocast(head.weight.device.type, enabled=False):
            return _measure(model.eval(), head)
    finally:
        model.train(was_training)


class WatchedHead:
    """While open, `input` is what the head last read [1, n, D] and `product` what it made of it.

    Args:
        model: a model of transformers.
        replace: stands in for the product.
    """

    def __init__(self, model: Any, replace: Tensor | None = None):
        self._model, self._replace = model, replace
        self.input: Tensor | None = None
        self.state: Tensor | None = None

    def __enter__(self) -> "WatchedHead":
        head = self._model.get_output_embeddings()
        self._handles = [
            decoder_of(self._model).register_forward_hook(self._after_decoder),
            head.register_forward_hook(self._after_head),
        ]
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    def _after_decoder(self, _module, _args, output) -> None:
        made = output[0] if isinstance(output, tuple) else output
        self.state = made if isinstance(made, Tensor) else getattr(made, "last_hidden_state", None)

    def _after_head(self, _module, args, product) -> Tensor | None:
        self.input = args[0]
        if self._replace is None:
            return None
        return self._replace.to(product.device).expand(*product.shape)


def probe_ids(model: Any) -> Tensor:
    """int64 [1, n]: a few ordinary tokens, none of them a picture's placeholder."""
    config = model.config
    special = {
        value
        for each in (config, config.get_text_config())
        for name, value in each.to_dict().items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    ids = [i for i in range(config.get_text_config().vocab_size) if i not in special]
    device = next(model.parameters()).device
    return torch.tensor([ids[:: max(1, min(len(ids), 200) // NUM_TOKENS)][:NUM_TOKENS]]).to(device)


def _measure(model: Any, head: Any) -> HeadForm:
    ids = probe_ids(model)
    with WatchedHead(model) as seen:
        logits = model(input_ids=ids, use_cache=False).logits
    if seen.input is None or logits.shape[-1] > len(head.weight):
        raise _unfit(model, "does not make its logits with its output embedding")
    scale, softcap = _after_product(model, ids, len(head.weight))
    bias = getattr(head, "bias", None)
    form = Head(head.weight, bias if bias is None else bias * scale, softcap, scale)
    found = form.logits(seen.input)[..., : logits.shape[-1]].float()
    gap, largest = float((found - logits).abs().max()), float(logits.abs().max())
    if not gap <= _tolerance(seen.input) * max(largest, 1.0):
        raise _unfit(model, f"says logits {gap:.3g} away from those of its matrix and last state")
    return HeadForm(_factor(seen.state, seen.input), scale, softcap)


def _after_product(model: Any, ids: Tensor, width: int) -> tuple[float, float | None]:
    """(factor, soft cap) between the head's product and the logits."""
    ranks = torch.linspace(-1, 1, width, dtype=torch.float64)
    decades = torch.log10(torch.tensor(LARGEST / SMALLEST, dtype=torch.float64))
    products = ranks.sign() * SMALLEST * 10 ** (ranks.abs() * decades)
    with WatchedHead(model, products.float()):
        logits = model(input_ids=ids, use_cache=False).logits
    found, tolerance = logits[0].double(), RELATIVE[torch.float32]
    if logits.dtype not in RELATIVE:
        tolerance = HALF_RELATIVE
    products = products.to(found.device)[: found.shape[1]]
    scale, softcap = _fit(found[0], products)
    capped = products * scale
    if softcap is not None:
        capped = softcap * (capped / softcap).tanh()
    if not ((found - capped).abs() <= tolerance * (capped.abs() + SMALLEST)).all():
        raise _unfit(model, "changes its logits by more than a factor and a soft cap")
    return scale, softcap


def _fit(found: Tensor, products: Tensor) -> tuple[float, float | None]:
    small = products.abs() <= 30 * SMALLEST
    scale = float((found[small] * products[small]).sum() / products[small].square().sum())
    scale = 1.0 if abs(scale - 1) <= 1e-6 else float(f"{scale:.7g}")
    largest = float(found.abs().max())
    return scale, None if largest > 0.5 * abs(scale) * LARGEST else largest


def _factor(state: Tensor | None, read: Tensor) -> float | None:
    """a where read = a * state, else None."""
    if state is None or state.shape != read.shape:
        return None
    given, wanted = state.double(), read.double()
    factor = float((given * wanted).sum() / given.square().sum())
    if not (wanted - factor * given).abs().max() <= _tolerance(read) * wanted.abs().max():
        return None
    return 1.0 if abs(factor - 1) <= 1e-6 else float(f"{factor:.7g}")


def _tolerance(values: Tensor) -> float:
    return RELATIVE.get(values.dtype, HALF_RELATIVE)


def _unfit(model: Any, found: str) -> TeacherError:
    return TeacherError(
        f"{type(model).__name__} {found}",
        expected="logits = softcap(scale * (matrix @ state + bias))",
        remedy="Use the divergences on cached top-k logits, which need no head.",
    )
