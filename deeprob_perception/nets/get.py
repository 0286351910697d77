# SPDX-License-Identifier: Apache-2.0
"""The Graph Embodiment Transformer (Patel and Song, "GET-Zero", ICRA 2025): a token a joint, attention biased by the graph.

Written from a specification of the released model and checked against its outputs; parameters have the published names, so
that a published state dict loads as it is. The robot's graph comes in as matrices: one network, and one export of it, serves
all robots.

Shapes in comments: B batch, n joints (tokens), F features of a token, C width, h heads, d = C / h.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GLOBAL, LOCAL = 12, 18  # floats of an observation: shared by all joints, and of each joint (the paper's layout)
NOT_A_JOINT = float("inf")  # what the heads give at padding: a tripwire for whoever reads it


class GraphEmbodimentTransformer(nn.Module):
    """Tokens and a graph in, one vector a joint and head out. The defaults are the paper's model (16.9 M parameters).

    :param token_dim: features of a token (12 shared, 18 of the joint).
    :param heads: of attention. :param outputs: prediction heads, name -> numbers for each joint.
    :param spatial, parent, child: whether distances in the graph, up and down the chain, bias the attention.
    :param edge: whether the kinds of links on the shortest path do (Graphormer's edge encoding; not in the paper's model).
    :param centrality: whether a joint's degree adds a learned vector.
    :param slots: whether a joint's place in the order does (ET+DFS).
    :param bias_after_softmax: add the bias to the attention's weights instead of its scores (a switch of the reference).
    :param max_joints: rows of the tables: the longest chain and path are one shorter.
    :param input_norm: a learned LayerNorm of the raw token.
    """

    def __init__(
        self,
        token_dim: int = GLOBAL + LOCAL,
        width: int = 512,
        heads: int = 16,
        layers: int = 8,
        feedforward: int = 1024,
        dropout: float = 0.1,
        outputs: Mapping[str, int] | None = None,
        head_units: int = 16,
        spatial: bool = True,
        parent: bool = True,
        child: bool = True,
        edge: bool = False,
        centrality: bool = False,
        slots: bool = False,
        bias_after_softmax: bool = False,
        max_joints: int = 16,
        max_degree: int = 4,
        link_types: int = 17,
        longest_path: int = 7,
        input_norm: bool = True,
    ):
        super().__init__()
        self.outputs = dict(outputs or {"policy": 1, "policy_forward_kinematics": 3})
        self.input_layer_norm = nn.LayerNorm(token_dim) if input_norm else nn.Identity()
        self.token_embedding = nn.Linear(token_dim, width)
        self.positional_encoding: nn.Module | None = None
        if centrality:
            self.positional_encoding = Centrality(max_degree, width)
        elif slots:
            self.positional_encoding = Slots(max_joints, width)
        self.dropout = nn.Dropout(dropout)
        bias = dict(spatial=spatial, parent=parent, child=child, edge=edge, max_joints=max_joints, link_types=link_types,
                    longest_path=longest_path)  # fmt: skip
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            Layer(width, heads, feedforward, dropout, bias_after_softmax, bias) for _ in range(layers)
        )
        self.head_modules = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(width, head_units), nn.ELU(), nn.Linear(head_units, size))
                for name, size in self.outputs.items()
            }
        )

    def forward(
        self,
        tokens: Tensor,
        distance: Tensor | None = None,
        parent: Tensor | None = None,
        child: Tensor | None = None,
        padding: Tensor | None = None,
        degree: Tensor | None = None,
        path: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Predict for every joint.

        :param tokens: float `[B, n, F]`.
        :param distance: of the shortest path between two joints, int64 `[n, n]` or `[B, n, n]`, -1 at padding.
        :param parent: k where the column is the k-th joint above the row, else 0; likewise. :param child: the same, below.
        :param padding: bool `[B, n]`, true where there is no joint; nobody attends to it and its outputs are infinite.
        :param degree: neighbours of each joint, int64 `[n]` or `[B, n]`, for `centrality`.
        :param path: link types along the shortest path, int64 `[n, n, longest_path]`, -1 after its end, for `edge`.
        :return: float `[B, n, k]` for each head of k numbers; `[B, n]` for k = 1.
        """
        x = self.token_embedding(self.input_layer_norm(tokens))
        if isinstance(self.positional_encoding, Centrality):
            assert degree is not None
            x = self.positional_encoding(x, degree)
        elif self.positional_encoding is not None:
            x = self.positional_encoding(x)
        x = self.dropout(x)
        for layer in self.encoder.layers:  # type: ignore[union-attr]
            x = layer(x, distance, parent, child, padding, path)
        # No LayerNorm after the last layer.
        found = {}
        for name, size in self.outputs.items():
            values = self.head_modules[name](x)  # [B, n, k]
            if padding is not None:
                values = values.masked_fill(padding[..., None], NOT_A_JOINT)
            found[name] = values.squeeze(-1) if size == 1 else values
        return found


def build(recipe: dict[str, Any]) -> GraphEmbodimentTransformer:
    """Return the network of a recipe, with random weights.

    :param recipe: `token`, `slots` (the most joints), and `network`: the other arguments of the class.
    """
    return GraphEmbodimentTransformer(recipe["token"], dropout=0.0, max_joints=recipe["slots"], **recipe["network"])


class Layer(nn.Module):
    """A pre-norm encoder layer with its own tables of biases, one scalar a head."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float, bias_after_softmax: bool, bias: dict):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attn = Attention(width, heads, dropout, bias_after_softmax)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)
        self.dropout = nn.Dropout(dropout)
        rows = bias["max_joints"]
        # Row 0 of each stays zero: padding in the first, not related in the others.
        self.spatial_embedding = table(rows + 1, heads) if bias["spatial"] else None
        self.parent_embedding = table(rows, heads) if bias["parent"] else None
        self.child_embedding = table(rows, heads) if bias["child"] else None
        self.edge_embedding: nn.Embedding | None = None
        if bias["edge"]:
            size = 8  # of a link type's vector, the reference's
            self.edge_embedding = table(bias["link_types"] + 1, size)
            self.edge_path_weight = nn.Parameter(torch.randn(heads, bias["longest_path"], size) * 0.02)

    def forward(
        self,
        x: Tensor,
        distance: Tensor | None,
        parent: Tensor | None,
        child: Tensor | None,
        padding: Tensor | None,
        path: Tensor | None,
    ) -> Tensor:
        x = x + self.dropout(self.self_attn(self.norm1(x), self.bias(distance, parent, child, path), padding))
        return x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(self.norm2(x))))))

    def bias(
        self, distance: Tensor | None, parent: Tensor | None, child: Tensor | None, path: Tensor | None = None
    ) -> Tensor | None:
        """Return the sum of the graph's biases, `[h, n, n]` or `[B, h, n, n]` (query, key); None without any."""
        parts = []
        for embedding, rows in (
            (self.spatial_embedding, None if distance is None else distance + 1),
            (self.parent_embedding, parent),
            (self.child_embedding, child),
        ):
            if embedding is not None:
                assert rows is not None, "the network is biased by a matrix that is not given"
                parts.append(embedding(rows))  # [..., n, n, h]
        if self.edge_embedding is not None:
            assert path is not None
            dots = torch.einsum("...ijse,hse->...ijsh", self.edge_embedding(path + 1), self.edge_path_weight)
            length = (path >= 0).sum(-1, keepdim=True).clamp(min=1)  # [..., n, n, 1]
            parts.append((dots * (path >= 0)[..., None]).sum(-2) / length)
        return sum(parts).movedim(-1, -3) if parts else None  # type: ignore[union-attr]


class Attention(nn.Module):
    """Multi-head attention with a bias; query, key and value packed in that order, as in torch's own."""

    def __init__(self, width: int, heads: int, dropout: float, bias_after_softmax: bool):
        super().__init__()
        self.heads = heads
        self.bias_after_softmax = bias_after_softmax
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, bias: Tensor | None, padding: Tensor | None) -> Tensor:
        batch, joints, width = x.shape
        q, k, v = (
            part.reshape(batch, joints, self.heads, width // self.heads).transpose(1, 2)
            for part in F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        )  # [B, h, n, d]
        scores = (q * (width // self.heads) ** -0.5) @ k.transpose(-2, -1)  # [B, h, n, n]
        if bias is not None and not self.bias_after_softmax:
            scores = scores + bias
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None, :], float("-inf"))
        weights = scores.softmax(-1)
        if bias is not None and self.bias_after_softmax:
            weights = weights + bias
        x = self.dropout(weights) @ v
        return self.out_proj(x.transpose(1, 2).reshape(batch, joints, width))


class Centrality(nn.Module):
    """A learned vector for each number of neighbours."""

    def __init__(self, max_degree: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(max_degree + 1, width)

    def forward(self, x: Tensor, degree: Tensor) -> Tensor:
        return x + self.embedding(degree)


class Slots(nn.Module):
    """A learned vector for each place in the depth-first order (MetaMorph's; it ties the network to one order of joints)."""

    def __init__(self, max_joints: int, width: int):
        super().__init__()
        self.pe = nn.Parameter(torch.randn(max_joints, 1, width) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pe[: x.shape[1], 0]


def table(rows: int, size: int) -> nn.Embedding:
    """Return an embedding whose row 0 is zero and stays so (initial values as in the reference)."""
    embedding = nn.Embedding(rows, size, padding_idx=0)
    with torch.no_grad():
        embedding.weight.normal_(0, 0.02)
        embedding.weight[0].zero_()
    return embedding


def tokens_of(observation: Tensor) -> Tensor:
    """Cut observations `[B, 12 + 18 n]` into tokens `[B, n, 30]`; the shared part goes into each."""
    shared, local = observation[:, :GLOBAL], observation[:, GLOBAL:].unflatten(1, (-1, LOCAL))
    return torch.cat((shared[:, None].expand(-1, local.shape[1], -1), local), -1)


def imitation_loss(
    found: Mapping[str, Tensor], target: Mapping[str, Tensor], padding: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the mean squared error of each head that has a target, and their weighted sum `total`.

    Padded joints count as no error but stay in the mean's denominator, as in the reference.
    """
    weight = {"policy": 1.0, "policy_forward_kinematics": 2.0}
    losses = {}
    for name, truth in target.items():
        error = found[name] - truth
        if padding is not None:
            error = error.masked_fill(padding if error.ndim == 2 else padding[..., None], 0.0)
        losses[name] = error.square().mean()
    return {**losses, "total": sum((weight.get(name, 1.0) * loss for name, loss in losses.items()), torch.zeros(()))}
