"""Who is measured by `benchmarks.topk_divergence`, each as one function from tensors to a loss.

One idea: a contender says what it computes (divergence and tail) and is compared with the fp64
truth of exactly that, so a row of the table never hides different work. All are called as
published: Liger-Kernel and cut-cross-entropy from PyPI, naive as the usual four lines of torch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stillroom.pipeline.kernels.linear_divergence import linear_divergence
from stillroom.pipeline.kernels.topk_divergence import topk_divergence


@dataclass
class Problem:
    """One set of inputs; the dense forms of the teacher are made before any clock starts."""

    hidden: Tensor
    head: Tensor
    ids: Tensor
    logprobs: Tensor
    labels: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    dense: Tensor | None = None

    @classmethod
    def make(cls, n: int, d: int, v: int, k: int, dtype: torch.dtype, device: str) -> "Problem":
        """Random states and heads; the teacher's logits have standard deviation 3."""
        random = torch.Generator(device).manual_seed(0)
        normal = lambda *s: torch.randn(*s, generator=random, device=device)  # noqa: E731
        hidden, head = normal(n, d), normal(v, d) * d**-0.5
        teacher_hidden, teacher_head = normal(n, d), normal(v, d) * 3 * d**-0.5
        lists = [
            (rows @ teacher_head.T).log_softmax(1).topk(k, 1) for rows in teacher_hidden.split(512)
        ]
        logprobs, ids = (torch.cat(part) for part in zip(*lists, strict=True))
        return cls(
            hidden.to(dtype).requires_grad_(),
            head.to(dtype).requires_grad_(),
            ids.int(),
            logprobs,
            ids[:, 0].clone(),
            teacher_hidden.to(dtype),
            teacher_head.to(dtype),
        )

    def rows(self, count: int) -> "Problem":
        """The first rows, as leaves of their own."""
        return Problem(
            self.hidden.detach()[:count].clone().requires_grad_(),
            self.head.detach().clone().requires_grad_(),
            self.ids[:count],
            self.logprobs[:count],
            self.labels[:count],
            self.teacher_hidden[:count],
            self.teacher_head,
        )

    def double(self) -> "Problem":
        """The same numbers in fp64."""
        return Problem(
            self.hidden.detach().double().requires_grad_(),
            self.head.detach().double().requires_grad_(),
            self.ids,
            self.logprobs.double(),
            self.labels,
            self.teacher_hidden.double(),
            self.teacher_head.double(),
        )

    def with_dense(self) -> "Problem":
        """With the teacher's list scattered to [N, V], for kernels that ask for that."""
        dense = torch.zeros(len(self.ids), len(self.head), dtype=self.hidden.dtype)
        dense = dense.to(self.hidden.device)
        dense.scatter_(1, self.ids.long(), self.logprobs.exp().to(dense.dtype))
        self.dense = dense
        return self


@dataclass(frozen=True)
class Contender:
    """Something to measure.

    Attributes:
        impl: its name in the results.
        divergence, tail: what it computes; `cross_entropy` is against `labels`.
        loss: the scalar (summed) loss.
        dense: whether it wants the teacher's list scattered to [N, V].
    """

    impl: str
    divergence: str
    tail: str
    loss: Callable[[Problem], Tensor]
    dense: bool = False


def ours(impl: str, divergence: str = "forward_kl", tail: str = "bucket") -> Contender:
    """`topk_divergence`, or `linear_divergence` for the tail 'dense'."""

    def sparse(p: Problem) -> Tensor:
        return topk_divergence(
            p.hidden, p.head, p.ids, p.logprobs, divergence=divergence, tail=tail, impl=impl
        ).sum()

    def dense(p: Problem) -> Tensor:
        return linear_divergence(
            p.hidden, p.head, p.teacher_hidden, p.teacher_head, divergence=divergence, impl=impl
        ).sum()

    def hard(p: Problem) -> Tensor:
        certain = torch.zeros(len(p.labels), 1, device=p.labels.device)
        ids = p.labels[:, None]
        return topk_divergence(p.hidden, p.head, ids, certain, tail="truncate", impl=impl).sum()

    loss = {"dense": dense, "label": hard}.get(tail, sparse)
    return Contender(f"stillroom {impl}", divergence, tail, loss)


def truth(contender: Contender) -> Contender:
    """The fp64 judge of a contender."""
    return ours("eager", contender.divergence, contender.tail)


def naive_kl(p: Problem) -> Tensor:
    """Truncated forward KL, as it is usually written."""
    log_q = (p.hidden @ p.head.T).float().log_softmax(-1)
    return (p.logprobs.exp() * (p.logprobs - log_q.gather(1, p.ids.long()))).sum()


def naive_cross_entropy(p: Problem) -> Tensor:
    """Cross-entropy, as it is usually written."""
    return F.cross_entropy((p.hidden @ p.head.T).float(), p.labels, reduction="sum")


def compiled(function: Callable[[Problem], Tensor]) -> Callable[[Problem], Tensor]:
    """The function under torch.compile, for the shapes it is first called with."""
    return torch.compile(function, dynamic=False)


def liger_jsd(p: Problem) -> Tensor:
    """Liger's chunked JSD between two heads (its hard loss has weight 0, but is computed)."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    labels = p.labels.long()
    # It averages over rows.
    return len(labels) * LigerFusedLinearJSDFunction.apply(
        p.hidden, p.head, p.teacher_hidden, p.teacher_head, labels, None, None, 0.0, 1.0, 0.5,
        -100, 1.0, True, 128 if p.hidden.device.type == "cpu" else 1024,
    )  # fmt: skip


def liger_kl(p: Problem) -> Tensor:
    """Liger's fused KL against a dense target."""
    from liger_kernel.ops.fused_linear_kl_div import LigerFusedLinearKLDivFunction

    return LigerFusedLinearKLDivFunction.apply(p.hidden, p.head, p.dense, None, "sum")


def liger_cross_entropy(budget: int) -> Callable[[Problem], Tensor]:
    """Liger's fused linear cross-entropy; `budget` 1 is its default, 16 its large-chunk setting."""

    def loss(p: Problem) -> Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        found = LigerFusedLinearCrossEntropyFunction.apply(
            p.hidden, p.head, p.labels, None, None, -100, 0.0, 0.0, "sum", None, False, None, False,
            False, False, None, None, budget,
        )  # fmt: skip
        return found[0] if isinstance(found, tuple) else found

    return loss


def cut_cross_entropy(impl: str) -> Callable[[Problem], Tensor]:
    """Apple's cut cross-entropy."""

    def loss(p: Problem) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(p.hidden, p.head, p.labels, reduction="sum", impl=impl)

    return loss


def on_cpu() -> list[Contender]:
    """What runs on a CPU without an interpreter."""
    return [
        ours("chunked"),
        ours("chunked", "forward_kl", "truncate"),
        Contender("naive autograd", "forward_kl", "truncate", naive_kl),
        Contender("torch.compile", "forward_kl", "truncate", compiled(naive_kl)),
        ours("eager"),
        ours("chunked", "reverse_kl"),
        ours("chunked", "jsd"),
        ours("chunked", "cross_entropy", "label"),
        Contender("naive autograd", "cross_entropy", "label", naive_cross_entropy),
        Contender(
            "cut-cross-entropy torch_compile",
            "cross_entropy",
            "label",
            cut_cross_entropy("torch_compile"),
        ),
        ours("chunked", "jsd", "dense"),
        Contender("Liger-Kernel chunked_loss", "jsd", "dense", liger_jsd),
    ]


def on_cuda() -> list[Contender]:
    """Everything."""
    return [
        ours("triton"),
        ours("triton", "forward_kl", "truncate"),
        ours("triton", "reverse_kl"),
        ours("triton", "jsd"),
        ours("triton", "cross_entropy", "label"),
        ours("triton", "forward_kl", "dense"),
        ours("triton", "jsd", "dense"),
        ours("chunked"),
        ours("chunked", "jsd", "dense"),
        Contender("naive autograd", "forward_kl", "truncate", naive_kl),
        Contender("torch.compile", "forward_kl", "truncate", compiled(naive_kl)),
        Contender("Liger-Kernel fused KL", "forward_kl", "truncate", liger_kl, dense=True),
        Contender("Liger-Kernel fused CE", "cross_entropy", "label", liger_cross_entropy(1)),
        Contender(
            "Liger-Kernel fused CE, large chunks",
            "cross_entropy",
            "label",
            liger_cross_entropy(16),
        ),
        Contender("Liger-Kernel chunked_loss", "jsd", "dense", liger_jsd),
        Contender("cut-cross-entropy cce", "cross_entropy", "label", cut_cross_entropy("cce")),
        Contender(
            "cut-cross-entropy torch_compile",
            "cross_entropy",
            "label",
            cut_cross_entropy("torch_compile"),
        ),
    ]
