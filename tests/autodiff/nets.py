"""Real nets, each beside the same net in elementary operations, which also takes complex input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import elementary as E
from .operator_list import F64, seeded


@dataclass(frozen=True)
class Net:
    """A net as users write it.

    Attributes:
        name: in the test's id.
        fn: [*shape] -> any shape.
        elementary: the same in elementary operations, analytic in its input.
        shape: of its input; the first dimension is the batch's.
        mixes: whether samples of the batch depend on each other.
        scale: length of the directions, so that all derivatives are of moderate size.
    """

    name: str
    fn: Callable[[Tensor], Tensor]
    elementary: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    mixes: bool = False
    scale: float = 1.0

    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(self.shape, generator=generator, dtype=F64)
        v = torch.randn(self.shape, generator=generator, dtype=F64)
        return x, v * self.scale


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(channels, out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn1(self.conv1(x)))
        return F.silu(self.bn2(self.conv2(y)) + self.shortcut(x))

    def elementary(self, x: Tensor) -> Tensor:
        y = E.silu(E.batch_norm(conv(x, self.conv1), self.bn1))
        y = E.batch_norm(conv(y, self.conv2), self.bn2)
        x = conv(x, self.shortcut) if isinstance(self.shortcut, nn.Conv2d) else x
        return E.silu(y + x)


def conv(x: Tensor, module: nn.Conv2d) -> Tensor:
    padding = cast(tuple[int, int], module.padding)
    return E.conv2d(x, module.weight, module.bias, module.stride[0], padding[0])


class ResNet(nn.Module):
    """A stem, two residual blocks, an average and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU())
        self.blocks = nn.Sequential(Block(4, 4, 1), Block(4, 6, 2))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))

    def elementary(self, x: Tensor) -> Tensor:
        first, norm, _ = self.stem
        x = E.silu(E.batch_norm(conv(x, first), norm))
        for block in self.blocks:
            x = block.elementary(x)
        return E.affine(x.mean((-2, -1)), self.head[2].weight, self.head[2].bias)


class Recurrent(nn.Module):
    """A GRU cell unrolled over [B, T, D], then a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = None
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)

    def elementary(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 5, dtype=x.dtype)
        for t in range(x.shape[1]):
            h = E.gru_cell(x[:, t], h, self.cell)
        return E.affine(h, self.head.weight, self.head.bias)


class FermiNet(nn.Module):
    """Electrons [B, N, 3] -> log|psi| [B]: streams of electrons and pairs, two determinants."""

    nuclei = torch.tensor([[0.0, 0.0, -0.7], [0.0, 0.0, 0.7]], dtype=F64)

    def __init__(self, electrons: int = 4, width: int = 6, determinants: int = 2) -> None:
        super().__init__()
        self.up, self.determinants = electrons // 2, determinants
        pair = 4
        self.ones = nn.ModuleList(
            [nn.Linear(3 * 8 + 2 * 4, width), nn.Linear(3 * width + 8, width)]
        )
        self.twos = nn.ModuleList([nn.Linear(4, pair)])
        self.orbitals = nn.Linear(width, determinants * electrons)
        self.decay = nn.Parameter(torch.rand(determinants * electrons) + 0.5)

    def forward(self, r: Tensor) -> Tensor:
        to_nuclei = r.unsqueeze(-2) - self.nuclei
        distance = torch.linalg.norm(to_nuclei, dim=-1, keepdim=True)
        one = torch.cat([to_nuclei, distance], -1).flatten(-2)
        apart = r.unsqueeze(-2) - r.unsqueeze(-3)
        eye = torch.eye(r.shape[-2], dtype=F64).unsqueeze(-1)
        # The distance of an electron to itself has no derivative: it is kept off zero and masked.
        apart_norm = torch.linalg.norm(apart + eye, dim=-1, keepdim=True) * (1 - eye)
        two = torch.cat([apart, apart_norm], -1)
        one = torch.tanh(self.ones[0](self.mixed(one, two)))
        two = torch.tanh(self.twos[0](two))
        one = one + torch.tanh(self.ones[1](self.mixed(one, two)))
        envelope = torch.exp(-distance * self.decay).sum(-2)
        phi = self.orbitals(one) * envelope
        phi = phi.unflatten(-1, (self.determinants, -1)).transpose(-2, -3)
        sign, logabs = torch.linalg.slogdet(phi)
        most = logabs.amax(-1, keepdim=True)
        total = (sign * torch.exp(logabs - most)).sum(-1)
        return torch.log(torch.abs(total)) + most.squeeze(-1)

    def mixed(self, one: Tensor, two: Tensor) -> Tensor:
        up = self.up
        means = [part.mean(-2, keepdim=True).expand_as(one) for part in halves(one, up, -2)]
        return torch.cat([one, *means, *(part.mean(-2) for part in halves(two, up, -2))], -1)

    def elementary(self, r: Tensor) -> Tensor:
        def norm(x: Tensor) -> Tensor:
            return (x * x).sum(-1, keepdim=True) ** 0.5

        def linear(x: Tensor, module: Any) -> Tensor:
            return E.affine(x, module.weight, module.bias)

        to_nuclei = r.unsqueeze(-2) - self.nuclei
        distance = norm(to_nuclei)
        one = torch.cat([to_nuclei, distance], -1).flatten(-2)
        apart = r.unsqueeze(-2) - r.unsqueeze(-3)
        eye = torch.eye(r.shape[-2], dtype=F64).unsqueeze(-1)
        two = torch.cat([apart, norm(apart + eye) * (1 - eye)], -1)
        one = E.tanh(linear(self.mixed(one, two), self.ones[0]))
        two = E.tanh(linear(two, self.twos[0]))
        one = one + E.tanh(linear(self.mixed(one, two), self.ones[1]))
        phi = linear(one, self.orbitals) * torch.exp(-distance * self.decay).sum(-2)
        phi = phi.unflatten(-1, (self.determinants, -1)).transpose(-2, -3)
        psi = E.det(phi).sum(-1)
        return torch.log(psi * psi) / 2


def halves(x: Tensor, up: int, dim: int) -> tuple[Tensor, Tensor]:
    return x.narrow(dim, 0, up), x.narrow(dim, up, x.shape[dim] - up)


def nets() -> tuple[Net, ...]:
    evaluated, trained = seeded(ResNet).eval(), seeded(ResNet).train()
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True}
    after = seeded(nn.TransformerEncoderLayer, 6, 2, 8, **options)
    before = seeded(nn.TransformerEncoderLayer, 6, 2, 8, norm_first=True, **options)
    fast = copy.deepcopy(after).eval()  # takes torch's fused path where it can
    recurrent, fermions = seeded(Recurrent), seeded(FermiNet)
    image, tokens = (2, 2, 6, 6), (2, 4, 6)
    return (
        Net("ResNet, eval", evaluated, evaluated.elementary, image),
        Net("ResNet, train", trained, trained.elementary, image, mixes=True, scale=0.2),
        Net("encoder layer", after, lambda x: E.encoder_layer(x, after), tokens, scale=0.5),
        Net(
            "encoder layer, norm first",
            before,
            lambda x: E.encoder_layer(x, before),
            tokens,
            scale=0.5,
        ),
        Net("encoder layer, eval", fast, lambda x: E.encoder_layer(x, fast), tokens, scale=0.5),
        Net("GRU cell", recurrent, recurrent.elementary, (2, 3, 3)),
        Net("FermiNet", fermions, fermions.elementary, (2, 4, 3), scale=0.15),
    )
