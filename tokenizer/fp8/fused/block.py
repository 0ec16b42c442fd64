"""A block of the transformer whose linear layers, norms and activations are fused for FP8.

The parameters are those of the block that it takes the place of, the same objects under the same names. A block is two
functions with attention between them, so that what is rounded never leaves them:

    x            -> norm, qkv, QK norm and rotation -> queries, keys, values
    attended, x  -> output, addition, norm, up, GELU, down, addition -> x

Beside the products, a pass reads and writes every activation once, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tokenizer.fp8.emulate import E4M3
from tokenizer.fp8.fused import launch, products
from tokenizer.fp8.fused.launch import Heads, Kept, Operand, Site
from tokenizer.fp8.fused.scales import BLOCK_LAYERS, TENSORS, Scales, aligned_zeros
from tokenizer.model.attention import attend
from tokenizer.model.plan import Plan
from tokenizer.model.transformer import Block, BlockCache, RMSNorm, Rotary

_QKV, _OUT, _UP, _DOWN = range(len(BLOCK_LAYERS))


class FusedBlock(Block):
    """See the module.

    Args:
        block: whose parts it takes.
        scales: of all blocks. number: of this one among them.

    Where tokens see the context of earlier tiles, which is in decoding alone, the block computes as it did before.
    """

    def __init__(self, block: Block, scales: Scales, number: int) -> None:
        nn.Module.__init__(self)
        self.attention_norm, self.attention = block.attention_norm, block.attention
        self.mlp_norm, self.mlp = block.mlp_norm, block.mlp
        self.scales, self._first = scales, TENSORS * number
        self.fast_backward = scales.config.fast_accumulation == "all"
        self._rounded: tuple[list[int], list[Operand]] | None = None
        self.train(block.training)

    def compile(self, *_: Any, **__: Any) -> None:
        """Nothing: what is fused by hand has no use for a compiler."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self, x: Tensor, plan: Plan, rotary: Rotary | None, cache: BlockCache | None = None
    ) -> tuple[Tensor, BlockCache | None]:
        """As of `Block`; computed in bfloat16 and FP8, returned in the type of x."""
        if plan.carry is not None or not len(x):
            return super().forward(x, plan, rotary, cache)
        with torch.autocast(x.device.type, enabled=False):
            remember = torch.is_grad_enabled()
            weights = self.weights(remember)
            heads = self._heads(rotary)
            query, key, value, stream = _Start.apply(  # type: ignore[no-untyped-call]
                x.bfloat16(), self, weights[_QKV], heads, remember,
                *_parameters(self.attention_norm, self.attention.qkv), *(heads.scales or (None, None)),
            )  # fmt: skip
            attended = attend(query, key, value, plan.segments, cudnn=self.attention.cudnn)
            result: Tensor = _Rest.apply(  # type: ignore[no-untyped-call]
                attended.flatten(1), stream, self, weights, remember,
                *_parameters(self.attention.out, self.mlp_norm, self.mlp.up, self.mlp.down),
            )  # fmt: skip
        return result.to(x.dtype), None

    def site(self, layer: int, *, gradient: bool = False, remember: bool = True) -> Site:
        return Site(self.scales, self._first + layer + (len(BLOCK_LAYERS) if gradient else 0), remember)

    @torch.no_grad()
    def weights(self, remember: bool) -> list[Operand]:
        """The rounded weights of `BLOCK_LAYERS`. Training keeps them for a step; other calls round them anew."""
        layers = [cast(nn.Linear, self.get_submodule(name)) for name in BLOCK_LAYERS]
        # What FSDP2 gathers has versions that say nothing, and a loop of one's own may not tell of its steps.
        state = [self.scales.step, *(layer.weight._version for layer in layers)]
        if remember and self._rounded is not None and self._rounded[0] == state:
            return self._rounded[1]
        largest = torch.stack(torch._foreach_norm([layer.weight for layer in layers], torch.inf)).float()
        scale = self.scales.scale_for(largest, torch.finfo(E4M3).max)
        inverse = aligned_zeros(len(layers), scale.device).copy_(scale.reciprocal())
        rounded = []
        for number, layer in enumerate(layers):
            both = launch.cast_weight(layer.weight.detach(), scale[number], E4M3, self.scales.ignored)
            bias = None if layer.bias is None else layer.bias.detach().bfloat16()
            rounded.append(Operand(*both, inverse[number], bias))
        self._rounded = (state, rounded) if remember else None
        return rounded

    def _heads(self, rotary: Rotary | None) -> Heads:
        attention = self.attention
        scales = None
        if attention.query_norm is not None and attention.key_norm is not None:
            scales = attention.query_norm.scale, attention.key_norm.scale
        return Heads(attention.heads, attention.head_width, scales, rotary[0] if rotary is not None else None)


def _parameters(*modules: nn.Module) -> list[Tensor | None]:
    """Weight and bias of each, None where there is no bias."""
    return [getattr(module, name, None) for module in modules for name in ("weight", "bias")]


class _Start(torch.autograd.Function):
    """x [T, D] -> queries, keys, values [T, H, Dh], and x itself: its gradient comes back added to theirs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        block: FusedBlock,
        weight: Operand,
        heads: Heads,
        remember: bool,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        _: Tensor,
        bias: Tensor | None,
        *scales: Tensor | None,
    ) -> tuple[Tensor, ...]:
        site = block.site(_QKV, remember=remember)
        normed = launch.norm(x, None, norm_weight, norm_bias, site, rms=isinstance(block.attention_norm, RMSNorm))
        qkv = products.forward(normed.operand, weight)
        query, key = launch.split_heads(qkv, len(x), heads)
        value = qkv.view(len(qkv), 3, heads.heads, heads.width)[: len(x), 2]
        ctx.save_for_backward(
            x, normed.means, normed.factors, normed.operand.turned, norm_weight,
            # Without a QK norm the way back needs nothing of the projection but its type.
            qkv if scales[0] is not None else qkv.new_empty(1), *scales, heads.table, weight.turned,
        )  # fmt: skip
        # Views of numbers that share a tensor, which autograd would count as changed with any of them.
        ctx.inverses = normed.operand.inverse, weight.inverse
        ctx.block, ctx.heads, ctx.biases = block, heads, (norm_bias is not None, bias is not None)
        return query, key, value, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, means, factors, turned, norm_weight, qkv, query_scale, key_scale, table, weight = ctx.saved_tensors
        block, (norm_bias, bias), (inverse, weight_inverse) = ctx.block, ctx.biases, ctx.inverses
        fast = block.fast_backward
        scales = (query_scale, key_scale) if query_scale is not None else None
        heads = Heads(ctx.heads.heads, ctx.heads.width, scales, table)
        query, key, value, above = (gradient.contiguous() for gradient in gradients)
        operand, of_scales, of_bias = launch.split_heads_backward(
            (query, key, value), qkv, heads, block.site(_QKV, gradient=True), sums=bias
        )
        below = launch.norm_backward(
            products.of_inputs(operand, Kept(weight, weight_inverse), fast=fast),
            above,
            (x, means, factors),
            norm_weight,
            rms=isinstance(block.attention_norm, RMSNorm),
            bias=norm_bias,
        )
        of_weight = products.of_weight(operand, Kept(turned, inverse), fast=fast) if ctx.needs_input_grad[7] else None
        return (
            below.x, None, None, None, None,
            below.weight, below.bias, of_weight, of_bias, *(of_scales or (None, None)),
        )  # fmt: skip


class _Rest(torch.autograd.Function):
    """attended and x [T, D] -> what the block adds up to [T, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        attended: Tensor,
        x: Tensor,
        block: FusedBlock,
        weights: Sequence[Operand],
        remember: bool,
        *parameters: Tensor | None,
    ) -> Tensor:
        _, out_bias, norm_weight, norm_bias, _, up_bias, _, down_bias = parameters
        assert norm_weight is not None
        heads, _ = launch.cast(attended, block.site(_OUT, remember=remember))
        update = products.forward(heads, weights[_OUT])
        normed = launch.norm(
            x,
            update,
            norm_weight,
            norm_bias,
            block.site(_UP, remember=remember),
            rms=isinstance(block.mlp_norm, RMSNorm),
        )
        hidden = products.forward(normed.operand, weights[_UP])
        active = launch.gelu(hidden, len(x), block.site(_DOWN, remember=remember))
        result = products.forward(active, weights[_DOWN])[: len(x)].add_(normed.x)
        ctx.save_for_backward(
            heads.turned, normed.x, normed.means, normed.factors, normed.operand.turned, hidden, active.turned,
            norm_weight, *(weights[layer].turned for layer in (_OUT, _UP, _DOWN)),
        )  # fmt: skip
        operands = heads, normed.operand, active, weights[_OUT], weights[_UP], weights[_DOWN]
        ctx.inverses = [operand.inverse for operand in operands]
        ctx.block, ctx.biases = block, [bias is not None for bias in (out_bias, norm_bias, up_bias, down_bias)]
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        heads, x, means, factors, normed, hidden, active, norm_weight, out, up, down = ctx.saved_tensors
        heads_inverse, normed_inverse, active_inverse, out_inverse, up_inverse, down_inverse = ctx.inverses
        block, (out_bias, norm_bias, up_bias, down_bias) = ctx.block, ctx.biases
        fast = block.fast_backward
        of_out, of_up, of_down = (ctx.needs_input_grad[number] for number in (5, 9, 11))
        gradient = gradient.contiguous()
        above, for_down_bias = launch.cast(gradient, block.site(_DOWN, gradient=True), sums=down_bias)
        for_down = products.of_weight(above, Kept(active, active_inverse), fast=fast) if of_down else None
        middle, for_up_bias = launch.gelu_backward(
            products.of_inputs(above, Kept(down, down_inverse), fast=fast),
            hidden,
            len(x),
            block.site(_UP, gradient=True),
            sums=up_bias,
        )
        for_up = products.of_weight(middle, Kept(normed, normed_inverse), fast=fast) if of_up else None
        below = launch.norm_backward(
            products.of_inputs(middle, Kept(up, up_inverse), fast=fast),
            gradient,
            (x, means, factors),
            norm_weight,
            rms=isinstance(block.mlp_norm, RMSNorm),
            bias=norm_bias,
            site=block.site(_OUT, gradient=True),
            sums=out_bias,
        )
        assert below.operand is not None
        for_out = products.of_weight(below.operand, Kept(heads, heads_inverse), fast=fast) if of_out else None
        for_attended = products.of_inputs(below.operand, Kept(out, out_inverse), fast=fast)[: len(x)]
        return (
            for_attended, below.x, None, None, None,
            for_out, below.sums, below.weight, below.bias, for_up, for_up_bias, for_down, for_down_bias,
        )  # fmt: skip
