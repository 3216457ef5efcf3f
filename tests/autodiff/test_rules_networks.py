"""Rules of layers: norms, losses, convolutions, pools, attention, recurrence.

References are made of elementary operations: torch's fused norms are wrong in higher derivatives.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.autodiff.rule_checks import Case, check

A = (2, 3, 4)


def c(name, f, *shapes, **options):
    return Case(name, f, shapes or (A,), **options)


def tensor(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g)


def module(net, seed=0):
    """In double precision, with parameters that are not the initial ones and zeros."""
    g = torch.Generator().manual_seed(seed)
    net = net.double()
    for p in net.parameters():
        p.data = torch.randn(p.shape, dtype=torch.float64, generator=g) * 0.4
        p.requires_grad_(False)
    return net


def standard(x, dims, eps=1e-5):
    centered = x - x.mean(dims, keepdim=True)
    return centered / (centered.square().mean(dims, keepdim=True) + eps).sqrt()


def affine(x, w, b, at=1):
    shape = [1] * x.ndim
    shape[at] = -1
    return x * w.reshape(shape) + b.reshape(shape)


W4, B4, W3, B3 = tensor(4), tensor(4, seed=1), tensor(3), tensor(3, seed=1)
NORMALIZATION = [
    c(
        "layer_norm",
        lambda x: F.layer_norm(x, (4,), W4, B4),
        reference=lambda x: standard(x, -1) * W4 + B4,
    ),
    c(
        "layer_norm of two dims",
        lambda x: F.layer_norm(x, (3, 4)),
        reference=lambda x: standard(x, (1, 2)),
    ),
    c("torch.layer_norm", lambda x: torch.layer_norm(x, (4,)), reference=lambda x: standard(x, -1)),
    c(
        "layer_norm with weights",
        lambda x, w, b: F.layer_norm(x, (4,), w, b),
        A,
        (4,),
        (4,),
        reference=lambda x, w, b: standard(x, -1) * w + b,
    ),
    c(
        "rms_norm",
        lambda x: F.rms_norm(x, (4,), W4, eps=1e-3),
        reference=lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * W4,
    ),
    c(
        "group_norm",
        lambda x: F.group_norm(x, 2, tensor(4), tensor(4)),
        (2, 4, 3),
        reference=lambda x: affine(standard(x.reshape(2, 2, 6), -1).reshape(2, 4, 3), W4, W4),
    ),
    c(
        "instance_norm",
        lambda x: F.instance_norm(x, weight=W3, bias=B3),
        reference=lambda x: affine(standard(x, -1), W3, B3),
    ),
    c(
        "batch_norm train",
        lambda x: F.batch_norm(x, None, None, W3, B3, True),
        reference=lambda x: affine(standard(x, (0, 2)), W3, B3),
    ),
    c("batch_norm eval", lambda x: F.batch_norm(x.sin(), W3, B3.abs(), W3, B3)),
    c("local_response_norm", lambda x: F.local_response_norm(x, 3), (1, 5, 2)),
    c("normalize", lambda x: F.normalize(x, dim=-1)),
    c("normalize p=3", lambda x: F.normalize(x, 3.0, 1)),
]
SPREAD = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
NORMS = [
    c("norm", lambda x: torch.norm(x)),
    c("norm of dim", lambda x: x.norm(dim=-1, keepdim=True)),
    c("norm p=3", lambda x: torch.norm(x, 3, -1)),
    c("linalg.norm", lambda x: torch.linalg.norm(x, dim=(0, 2))),
    c("vector_norm 1", lambda x: torch.linalg.vector_norm(x, 1, -1)),
    c("vector_norm inf", lambda x: torch.linalg.vector_norm(x + SPREAD, math.inf, -1)),
    c("vector_norm -inf", lambda x: torch.linalg.vector_norm(x + SPREAD, -math.inf, (1, 2))),
    c("vector_norm 2.5", lambda x: torch.linalg.vector_norm(x, 2.5)),
    c(
        "cosine_similarity",
        lambda x, y: F.cosine_similarity(x, y, -1),
        A,
        (3, 4),
        reference=lambda x, y: (
            (x * y).sum(-1) / x.square().sum(-1).sqrt() / y.square().sum(-1).sqrt()
        ),
    ),
    c("pairwise_distance", lambda x, y: F.pairwise_distance(x, y + 2), A, A),
    c(
        "cdist",
        lambda x, y: torch.cdist(x, y + 1),
        A,
        (2, 2, 4),
        reference=lambda x, y: (x[:, :, None] - y[:, None] - 1).square().sum(-1).sqrt(),
    ),
    c(
        "pdist",
        lambda x: F.pdist(x + SPREAD),
        (3, 4),
        reference=lambda x: (
            (x + SPREAD)[[0, 0, 1]].sub((x + SPREAD)[[1, 2, 2]]).square().sum(-1).sqrt()
        ),
    ),
    c("dist", lambda x, y: torch.dist(x, y + 1), A, A),
    c("renorm", lambda x: torch.renorm(x, 2, 1, 0.5), reference=lambda x: _renorm(x)),
]


def _renorm(x):
    size = x.square().sum((0, 2), keepdim=True).sqrt()
    return x * (0.5 / (size + 1e-7))


LABELS = torch.tensor([1, 0, 2, 1])
SIGNS = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
T = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 0.5
LOSSES = [
    *(
        c(f"mse_loss {r}", lambda x, y, r=r: F.mse_loss(x, y, reduction=r), (4, 3), (4, 3))
        for r in ("none", "mean", "sum")
    ),
    c("l1_loss", lambda x: F.l1_loss(x + 1, T), (4, 3)),
    c("smooth_l1_loss near", lambda x: F.smooth_l1_loss(x, T), (4, 3)),
    c("smooth_l1_loss far", lambda x: F.smooth_l1_loss(x + 3, T, beta=0.5), (4, 3)),
    c(
        "huber_loss",
        lambda x: F.huber_loss(x + torch.arange(3) * 2, T, delta=1.4),
        (4, 3),
        step=0.01,
        reference="none",
    ),
    c(
        "cross_entropy",
        lambda x: F.cross_entropy(x, LABELS),
        (4, 3),
        reference=lambda x: (x.exp().sum(1).log() - x[range(4), LABELS]).mean(),
    ),
    c(
        "cross_entropy weighted",
        lambda x: F.cross_entropy(x, LABELS, W3.abs(), reduction="mean"),
        (4, 3),
        reference="none",
    ),
    c(
        "cross_entropy smoothed",
        lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.2),
        (4, 3),
        reference="none",
    ),
    c(
        "cross_entropy ignoring",
        lambda x: F.cross_entropy(x, LABELS, ignore_index=0),
        (4, 3),
        reference="none",
    ),
    c("cross_entropy of probabilities", lambda x: F.cross_entropy(x, T), (4, 3), reference="none"),
    *(
        c(
            f"cross_entropy {name}, weighted, smoothed, {reduction}",
            lambda x, target=target, reduction=reduction: F.cross_entropy(
                x, target, W3.abs(), None, 0 if target is LABELS else -100, None, reduction, 0.2
            ),
            (4, 3),
            reference="none",
        )
        for name, target in (("of probabilities", T), ("of labels", LABELS))
        for reduction in ("mean", "sum", "none")
    ),
    c(
        "cross_entropy of images",
        lambda x: F.cross_entropy(x, LABELS.reshape(2, 2), reduction="none"),
        (2, 3, 2),
        reference="none",
    ),
    c("nll_loss", lambda x: F.nll_loss(x.log(), LABELS, W3.abs()), (4, 3)),
    c(
        "binary_cross_entropy",
        lambda x: F.binary_cross_entropy(x, T),
        (4, 3),
        high=0.8,
        reference=lambda x: -(T * x.log() + (1 - T) * (1 - x).log()).mean(),
    ),
    c(
        "binary_cross_entropy_with_logits",
        lambda x: F.binary_cross_entropy_with_logits(x, T, W3.abs(), pos_weight=B3.abs()),
        (4, 3),
        reference="none",
    ),
    c("kl_div", lambda x, y: F.kl_div(x, y, reduction="batchmean"), (4, 3), (4, 3)),
    c("kl_div log", lambda x, y: F.kl_div(x, y, log_target=True, reduction="sum"), (4, 3), (4, 3)),
    c("poisson_nll_loss", lambda x: F.poisson_nll_loss(x, T + 1, full=True), (4, 3)),
    c("gaussian_nll_loss", lambda x, v: F.gaussian_nll_loss(x, T, v), (4, 3), (4, 3)),
    c("soft_margin_loss", lambda x: F.soft_margin_loss(x, SIGNS), (2, 4)),
    c(
        "cosine_embedding_loss",
        lambda x: F.cosine_embedding_loss(x, T.expand(4, 3) + 0.1, SIGNS),
        (4, 3),
        reference="none",
    ),
    c("margin_ranking_loss", lambda x, y: F.margin_ranking_loss(x, y, SIGNS, 3.0), (4,), (4,)),
    c("hinge_embedding_loss", lambda x: F.hinge_embedding_loss(x, SIGNS, 2.0), (2, 4)),
    c("triplet_margin_loss", lambda x: F.triplet_margin_loss(x, T, T + 1, 3.0), (4, 3)),
]

X1, X2, X3 = (2, 4, 6), (1, 4, 5, 6), (1, 2, 4, 4, 4)
CONVOLUTIONS = [
    c("conv1d", lambda x: F.conv1d(x.sin(), tensor(3, 4, 2), B3, 2, 1), X1),
    c(
        "conv1d same",
        lambda x: F.conv1d(x.sin(), tensor(4, 2, 3), None, padding="same", groups=2),
        X1,
    ),
    c("conv1d unbatched", lambda x: F.conv1d(x.sin(), tensor(3, 4, 2), B3), (4, 6)),
    c("conv1d of weights", lambda x, w, b: F.conv1d(x, w, b), X1, (3, 4, 2), (3,)),
    c("conv1d of weights alone", lambda w: F.conv1d(tensor(2, 4, 6), w.sin()), (3, 4, 2)),
    c("conv2d", lambda x: F.conv2d(x.sin(), tensor(3, 4, 2, 3), B3, dilation=2), X2),
    c("conv3d", lambda x: F.conv3d(x.sin(), tensor(3, 2, 2, 2, 2), B3), X3),
    c("conv_transpose1d", lambda x: F.conv_transpose1d(x.sin(), tensor(4, 3, 2), B3, 2), X1),
    c(
        "conv_transpose2d",
        lambda x: F.conv_transpose2d(x.sin(), tensor(4, 3, 2, 2), B3, 2, 1, 1),
        X2,
    ),
    c("conv_transpose3d", lambda x: F.conv_transpose3d(x.sin(), tensor(2, 3, 2, 2, 2)), X3),
    *(
        c(f"Conv1d padded {mode}", module(nn.Conv1d(4, 3, 3, padding=1, padding_mode=mode)), X1)
        for mode in ("zeros", "reflect", "replicate", "circular")
    ),
    *(
        c(f"pad {mode}", lambda x, m=mode: F.pad(x.sin(), (1, 2), mode=m), X1)
        for mode in ("constant", "reflect", "replicate", "circular")
    ),
    c("pad with a number", lambda x: F.pad(x.sin(), (1, 0, 2, 1), value=2.0), X1),
    c("pad cropping", lambda x: F.pad(x.sin(), (-1, 1)), X1),
    c("pad reflect 2d", lambda x: F.pad(x.sin(), (1, 2, 1, 1), mode="reflect"), X2),
    c("avg_pool1d", lambda x: F.avg_pool1d(x.sin(), 3, 2, 1), X1),
    c("avg_pool2d", lambda x: F.avg_pool2d(x.sin(), 2, ceil_mode=True), X2),
    c("avg_pool3d", lambda x: F.avg_pool3d(x.sin(), 2), X3),
    c("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x.sin(), 4), X1),
    c("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x.sin(), (2, 3)), X2),
    c("lp_pool1d", lambda x: F.lp_pool1d(x, 3.0, 2), X1),
    *(
        c(
            f"interpolate {mode}",
            lambda x, m=mode: F.interpolate(x.sin(), scale_factor=2, mode=m),
            s,
        )
        for mode, s in (
            ("nearest", X1),
            ("linear", X1),
            ("bilinear", X2),
            ("bicubic", X2),
            ("area", X2),
            ("trilinear", X3),
        )
    ),
    c("Upsample", nn.Upsample(size=(7, 7), mode="bilinear", align_corners=True), X2),
    c(
        "grid_sample",
        lambda x: F.grid_sample(x.sin(), tensor(1, 2, 2, 2) / 3, align_corners=False),
        X2,
    ),
    c(
        "affine_grid",
        lambda t: F.affine_grid(t.sin(), [2, 3, 4, 5], align_corners=False),
        (2, 2, 3),
    ),
]
G = torch.Generator().manual_seed(7)
FAR1 = torch.randperm(48, generator=G).double().reshape(2, 4, 6)
FAR2 = torch.randperm(120, generator=G).double().reshape(1, 4, 5, 6)
FAR3 = torch.randperm(128, generator=G).double().reshape(X3)
POOLS = [
    c("max_pool1d", lambda x: F.max_pool1d(x.sin() + FAR1, 2), X1),
    c("max_pool2d", lambda x: F.max_pool2d(x.sin() + FAR2, 3, 2, 1), X2),
    c("max_pool3d", lambda x: F.max_pool3d(x.sin() + FAR3, 2), X3),
    c("torch.max_pool2d", lambda x: torch.max_pool2d(x.sin() + FAR2, 2), X2),
    c("MaxPool2d unbatched", lambda x: nn.MaxPool2d(2)(x.sin() + FAR2[0]), X2[1:]),
    c("max_pool with indices", lambda x: F.max_pool2d(x.sin() + FAR2, 2, return_indices=True), X2),
    c("adaptive_max_pool1d", lambda x: F.adaptive_max_pool1d(x.sin() + FAR1, 3), X1),
    c("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x.sin() + FAR2, 2), X2),
    c(
        "max_unpool1d",
        lambda x: F.max_unpool1d(*F.max_pool1d(x.sin() + FAR1, 2, return_indices=True), 2),
        X1,
    ),
]

MASK = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
BIAS = tensor(3, 3)
Q = (1, 2, 3, 4)


def attention(q, k, v, mask=None):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    e = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True) @ v


def mha(net, q, k, v, mask=None):
    """Multi-head attention of [B, L, E], one head at a time."""
    wq, wk, wv = net.in_proj_weight.chunk(3)
    bq, bk, bv = net.in_proj_bias.chunk(3)
    q, k, v = q @ wq.T + bq, k @ wk.T + bk, v @ wv.T + bv
    heads = zip(*(x.chunk(net.num_heads, -1) for x in (q, k, v)), strict=True)
    y = torch.cat([attention(*head, mask) for head in heads], -1)
    return y @ net.out_proj.weight.T + net.out_proj.bias


MHA = module(nn.MultiheadAttention(4, 2, batch_first=True))
NO_BIAS = module(nn.MultiheadAttention(4, 2, bias=False, batch_first=True))
KV = module(nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True, add_zero_attn=True))
ENCODER = module(nn.TransformerEncoderLayer(4, 2, 6, 0.0, "gelu", batch_first=True))
NORM_FIRST = module(nn.TransformerEncoderLayer(4, 2, 6, 0.0, torch.tanh, norm_first=True))


def encoder(x):
    x = (
        standard(x + mha(ENCODER.self_attn, x, x, x), -1) * ENCODER.norm1.weight
        + ENCODER.norm1.bias
    )
    y = x @ ENCODER.linear1.weight.T + ENCODER.linear1.bias
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    y = x + y @ ENCODER.linear2.weight.T + ENCODER.linear2.bias
    return standard(y, -1) * ENCODER.norm2.weight + ENCODER.norm2.bias


ATTENTION = [
    c("sdpa", F.scaled_dot_product_attention, Q, Q, Q, reference=attention, orders=4),
    c(
        "sdpa masked",
        lambda q: F.scaled_dot_product_attention(q, q, q, MASK),
        Q,
        reference=lambda q: attention(q, q, q, MASK),
        orders=4,
    ),
    c(
        "sdpa biased",
        lambda q: F.scaled_dot_product_attention(q, q, q, BIAS),
        Q,
        reference=lambda q: attention(q, q, q, BIAS),
        orders=4,
    ),
    c(
        "sdpa causal",
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
        Q,
        reference=lambda q: attention(q, q, q, MASK.new_ones(3, 3).tril()),
        orders=4,
    ),
    c(
        "sdpa scale",
        lambda q: F.scaled_dot_product_attention(q, q, q, scale=0.5),
        Q,
        reference=lambda q: attention(q, q, q),
        orders=4,
    ),
    c(
        "sdpa grouped",
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True),
        (1, 4, 3, 2),
        (1, 2, 3, 2),
        orders=4,
        reference=lambda q, k: attention(q, *(2 * [k.repeat_interleave(2, 1)])),
    ),
    c(
        "MultiheadAttention",
        lambda x: MHA(x, x, x)[0],
        (2, 3, 4),
        orders=4,
        reference=lambda x: mha(MHA, x, x, x),
    ),
    c(
        "MultiheadAttention weights",
        lambda x: MHA(x, x, x, average_attn_weights=False)[1],
        (2, 3, 4),
        reference="none",
    ),
    c(
        "MultiheadAttention masked",
        lambda x, y: MHA(x, y, y, attn_mask=~MASK, need_weights=False)[0],
        (2, 3, 4),
        (2, 3, 4),
        orders=4,
        reference=lambda x, y: mha(MHA, x, y, y, MASK),
    ),
    c(
        "MultiheadAttention padded",
        lambda x: MHA(x, x, x, key_padding_mask=torch.tensor([[False, False, True]]))[0],
        (1, 3, 4),
        orders=4,
        reference=lambda x: mha(MHA, x, x[:, :2], x[:, :2]),
    ),
    c(
        "MultiheadAttention of other sizes",
        lambda q, k, v: KV(q, k, v)[0],
        (3, 2, 4),
        (2, 2, 3),
        (2, 2, 5),
        reference="none",
    ),
    c(
        "MultiheadAttention of two inputs, without biases",
        lambda x, y: NO_BIAS(x, y, y)[0],
        (2, 3, 4),
        (2, 5, 4),
        reference="none",
    ),
    c("MultiheadAttention unbatched", lambda x: MHA(x, x, x)[0], (3, 4), reference="none"),
    c("TransformerEncoderLayer train", ENCODER.train(), (1, 3, 4), reference=encoder, orders=4),
    c(
        "TransformerEncoderLayer eval",
        lambda x: ENCODER.eval()(x),
        (1, 3, 4),
        reference=encoder,
        orders=4,
    ),
    c(
        "TransformerDecoderLayer",
        module(nn.TransformerDecoderLayer(4, 2, 6, 0.0, torch.tanh, batch_first=True)),
        (1, 2, 4),
        (1, 3, 4),
        reference="none",
    ),
    c(
        "TransformerEncoder with a mask",
        lambda x: nn.TransformerEncoder(NORM_FIRST, 2)(
            x, mask=nn.Transformer.generate_square_subsequent_mask(3).double()
        ),
        (3, 1, 4),
        reference="none",
    ),
    c("TransformerEncoderLayer norm_first", NORM_FIRST.eval(), (3, 1, 4), reference="none"),
]

S2 = (2, 3)
LSTM = module(nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True))
RECURRENT = [
    c("RNNCell", module(nn.RNNCell(3, 4)), S2, (2, 4), orders=4),
    c("RNNCell relu", module(nn.RNNCell(3, 4, nonlinearity="relu")), S2, orders=4, step=0.01),
    c("GRUCell", module(nn.GRUCell(3, 4)), S2, (2, 4), orders=4),
    c("LSTMCell", module(nn.LSTMCell(3, 4, bias=False)), S2, orders=4),
    c("RNN", module(nn.RNN(3, 4)), (3, 2, 3), orders=4),
    c("GRU", module(nn.GRU(3, 4, 2)), (3, 2, 3), (2, 2, 4), orders=4),
    c("GRU unbatched", module(nn.GRU(3, 4, bias=False)), (3, 3), orders=4),
    c("LSTM", LSTM, (2, 3, 3), orders=3),
    c("LSTM with projections", module(nn.LSTM(3, 4, proj_size=2)), (3, 2, 3), orders=3),
    c("LSTM of padded sequences", lambda x: _unpacked(LSTM(_pack(x))[0]), (3, 3, 3), orders=3),
    c("LSTM of packed sequences", lambda x: LSTM(_pack(x))[1], (3, 3, 3), orders=3),
]


def _unpacked(y):
    return nn.utils.rnn.pad_packed_sequence(y, batch_first=True, padding_value=2.0)


def _pack(x):
    return nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2, 1]), batch_first=True)


@pytest.mark.parametrize(
    "case",
    NORMALIZATION + NORMS + LOSSES + CONVOLUTIONS + POOLS + ATTENTION + RECURRENT,
    ids=str,
)
def test_series_of_a_layer(case):
    check(case)
