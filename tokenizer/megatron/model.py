"""AToken from Megatron layers: one or both of encoder and decoder, as the pipeline stage has it.

The blocks are Megatron's. What stands before and behind them (embeddings, positions, pooling, posterior, quantiser,
output layer, linear codes) is the native code, whole on every tensor rank: 1% of so400m's work, and every rank has all
tokens there, so a loss needs no knowledge of the layout and is computed alike on all tensor ranks.

Imports Megatron: call `tokenizer.megatron.engine.load_megatron` first, or use `tokenizer.megatron.build`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from tokenizer.errors import InputError
from tokenizer.megatron.config import ParallelConfig
from tokenizer.megatron.options import schedule_options, stack_options
from tokenizer.megatron.packing import Packing, pack
from tokenizer.megatron.rows import from_boundary, pad_rows, to_boundary
from tokenizer.megatron.specs import block_spec
from tokenizer.model.atoken import Encoding
from tokenizer.model.config import ATokenConfig, TransformerConfig
from tokenizer.model.encoder import AttentionPool
from tokenizer.model.piecewise import make_skip
from tokenizer.model.plan import item_segments, tile_plan
from tokenizer.model.positions import PositionTable
from tokenizer.model.posterior import Posterior
from tokenizer.model.precision import full_precision
from tokenizer.model.refiner import finished, make_refiner
from tokenizer.model.rope import rotary_table
from tokenizer.quantizers import Quantizer, make_quantizer
from tokenizer.sparse import SparseTokens


@dataclass(frozen=True, slots=True)
class Output:
    """What the last stage gives.

    encoding: as of the native model. On a second pipeline stage its features have no channels: token features stay
        with the encoder.
    patches: decoded tokens [N, P], or None if nothing was decoded.
    """

    encoding: Encoding
    patches: SparseTokens | None


class Stack(MegatronModule):  # type: ignore[misc]
    """Input layer, positions, blocks and final norm of one transformer."""

    def __init__(
        self, stack: TransformerConfig, parallel: ParallelConfig, inputs: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(config=stack_options(stack, parallel, dtype, device))
        self.stack = stack
        self.embed = nn.Linear(inputs, stack.width, bias=stack.bias)
        self.positions = PositionTable(stack.width) if stack.learned_positions else None
        self.block = TransformerBlock(self.config, block_spec(stack, parallel.transformer_impl))

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, where Megatron's schedules look for those of a model's decoder."""
        layers: nn.ModuleList = self.block.layers
        return layers

    def run(self, features: Tensor, packing: Packing, added: Tensor | None = None) -> Tensor:
        """[N, inputs] in batch order -> [N, D] in batch order, on every tensor rank.

        Args:
            added: [N, D], see `tokenizer.model.transformer.Transformer.forward`.
        """
        plan = packing.plan
        x = self.embed(plan.gather(features))
        if added is not None:
            x = x + plan.gather(added).to(x.dtype)
        if self.positions is not None:
            x = x + self.positions(plan).to(x.dtype)
        x = pad_rows(x, packing.total)[:, None]
        if self.config.recompute_granularity == "full" and torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()  # or the gradients of recomputed blocks vanish without a word
        if self.config.sequence_parallel:
            x = scatter_to_sequence_parallel_region(x)
        x = self.block(x, attention_mask=None, packed_seq_params=packing.parameters(self._rotary(packing)))
        if self.config.sequence_parallel:
            # Every rank goes on to compute the same loss, so each takes the gradient of its own tokens from it.
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)
        return plan.scatter(x[: features.shape[0], 0])

    def _rotary(self, packing: Packing) -> Tensor | None:
        if not self.stack.rotary:
            return None
        plan, width, kind = packing.plan, self.stack.head_width, full_precision(self.config.params_dtype)
        return plan.table(("rotary", width, kind), lambda: rotary_table(plan.positions, width, kind))


class EncoderPart(Stack):
    """Patches -> token features, posterior parameters and pooled vectors."""

    def __init__(
        self, config: ATokenConfig, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(config.encoder, parallel, config.patch_features, dtype, device)
        self.pool = AttentionPool(config.encoder)
        self.to_posterior = nn.Linear(config.encoder.width, 2 * config.latent_channels, bias=False)


class DecoderPart(Stack):
    """Latents -> patches."""

    def __init__(
        self, config: ATokenConfig, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        assert config.decoder is not None
        super().__init__(config.decoder, parallel, config.latent_channels, dtype, device)
        self.to_patches = nn.Linear(config.decoder.width, config.patch_features, bias=False)


class MegatronAToken(MegatronModule):  # type: ignore[misc]
    """The network, or the stage of it that this process has.

    Args:
        config: sizes, as of the native model.
        parallel: the layout; must be legal (`tokenizer.megatron.config.check_layout`), and its groups made.
        dtype / device: of the parameters.
        pre_process: has the encoder.
        post_process: has the decoder (if the model has one) and gives the output.

    Parameters hold no values yet: fill them with `tokenizer.megatron.exchange.load_native` or from a checkpoint.
    """

    def __init__(
        self,
        config: ATokenConfig,
        parallel: ParallelConfig,
        dtype: torch.dtype,
        device: torch.device,
        pre_process: bool = True,
        post_process: bool = True,
    ) -> None:
        super().__init__(config=schedule_options(config, parallel, dtype, device))
        self.network_config, self.parallel = config, parallel
        self.pre_process, self.post_process = pre_process, post_process
        # Megatron's schedules and gradient reductions read these.
        self.model_type, self.share_embeddings_and_output_weights = ModelType.encoder_or_decoder, False
        self.encoder = EncoderPart(config, parallel, dtype, device) if pre_process else None
        has_decoder = post_process and config.decoder is not None
        self.decoder = DecoderPart(config, parallel, dtype, device) if has_decoder else None
        self.skip = make_skip(config)
        self.refiner = make_refiner(config) if has_decoder else None
        self.quantizer: Quantizer | None = (
            make_quantizer(config.quantizer, config.latent_channels) if config.quantizer is not None else None
        )
        self.input_tensor: Tensor | None = None
        self.to(device=device, dtype=dtype)

    def set_input_tensor(self, input_tensor: Tensor | Sequence[Tensor | None] | None) -> None:
        """What the stage before has sent; pipeline schedules call it before `forward`."""
        received = input_tensor if isinstance(input_tensor, Tensor) or input_tensor is None else input_tensor[0]
        self.input_tensor = received

    def forward(
        self, patches: SparseTokens, generator: torch.Generator | None = None, decode: bool = True
    ) -> Output | Tensor:
        """Encode and decode a batch, or this stage's part of it.

        Args:
            patches: [N, P] with pixel values in [-1, 1]; a second pipeline stage reads its positions alone. All tensor
                ranks and stages of a model's copy must be given the same batch.
            generator: draws the latents of a continuous model from the posterior; without it they are its mean. It
                must be in the same state on all tensor ranks.
            decode: False for steps whose loss needs no pixels.

        Returns:
            `Output`; or on the first of two stages the tensor for the second (see `tokenizer.megatron.rows`).

        Raises:
            InputError: no tokens, an item without tokens, or a wrong number of features.
        """
        self._check(patches)
        patches = patches.to(dtype=self.config.params_dtype)
        features, parameters, pooled = self._encoded(patches)
        if not self.post_process:
            return to_boundary(parameters, pooled)
        posterior = Posterior(patches.with_features(parameters))
        encoding = Encoding(patches.with_features(features), pooled, posterior, self.quantizer)
        if not decode or self.decoder is None:
            return Output(encoding, None)
        sampled = self.quantizer is None and generator is not None
        latents = posterior.sample(generator) if sampled else encoding.latents
        return Output(encoding, self._decoded(latents))

    def _encoded(self, patches: SparseTokens) -> tuple[Tensor, Tensor, Tensor]:
        """Features [N, D] (or [N, 0] on a second stage), posterior parameters [N, 2C] and pooled vectors [B, D]."""
        config = self.network_config
        if self.encoder is None:
            assert self.input_tensor is not None, "a second stage runs inside a pipeline schedule"
            parameters, pooled = from_boundary(
                self.input_tensor, patches.num_tokens, patches.batch_size, config.encoder.width
            )
            return parameters[:, :0], parameters, pooled
        features = self.encoder.run(patches.features, self._packing(patches))
        parameters = self.encoder.to_posterior(features)
        if self.skip is not None:
            parameters = self.skip.add_to_parameters(parameters, patches.features, features)
        return features, parameters, self.encoder.pool(features, item_segments(patches), patches.batch_size)

    def _decoded(self, latents: SparseTokens) -> SparseTokens:
        assert self.decoder is not None
        read = self.skip.read(latents.features) if self.skip is not None else None
        patches = self.decoder.to_patches(self.decoder.run(latents.features, self._packing(latents), read))
        plan = tile_plan(latents, self.network_config.tile_steps)
        return latents.with_features(finished(patches, latents.features, plan, self.skip, self.refiner))

    def _packing(self, tokens: SparseTokens) -> Packing:
        return pack(tokens, self.network_config.tile_steps, self.parallel.token_multiple)

    def _check(self, patches: SparseTokens) -> None:
        if patches.num_tokens == 0 or bool((patches.lengths == 0).any()):
            raise InputError("every item of a batch needs at least one token; leave empty ones out")
        if patches.num_channels != self.network_config.patch_features:
            raise InputError(
                f"{self.network_config.name} takes patches of {self.network_config.patch_features} channels, "
                f"got {patches.num_channels}"
            )
