"""A piecewise linear code beside the transformers, for small models (released ones have none).

A small transformer with normalised tokens learns slowly to pass pixel magnitudes through. Here a set of linear codes
does that from the first step: each patch is coded by the one that fits it best, a few latent channels say which, and
the transformers add what is better than any linear code. `tokenizer.training.initialise` fits the codes to data.

K codes, c = C - d latent channels carry the coefficients, d channels carry the number of the code in base 4.

A coefficient means something else in each code. With `widths` the transformers read and write them through vectors of
each code's own (`CodeLinks`), so that a token looks alike to them whichever code it has.

The coefficients are known exactly where a patch is decoded, yet a transformer that adds what they leave open disturbs
them: then part of the error lies in the span of the code, where there need be none. With `consistent` that part of what
is added is taken out again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokenizer.model.config import ATokenConfig
from tokenizer.model.digits import LEVEL_VALUES, code_in_digits
from tokenizer.model.plan import host_rows
from tokenizer.model.precision import at_least_float32, no_autocast

BASE = 4
"""Levels of a channel that carries a digit; FSQ with 4 levels keeps them apart exactly."""

LEVELS = (-1.5, -0.7, 0.0, 0.95)
"""Latent values of the digits 0..3: each lies in the middle of the interval that FSQ maps to the same digit."""


class LinearCodes(nn.Module):
    """K affine codes of F features: coefficients = E_k (x - m_k), reconstruction = m_k + D_k^T coefficients."""

    def __init__(self, codes: int, channels: int, features: int) -> None:
        super().__init__()
        self.encoder = nn.Parameter(torch.zeros(codes, channels, features))
        self.decoder = nn.Parameter(torch.zeros(codes, channels, features))
        self.mean = nn.Parameter(torch.zeros(codes, features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, F] -> coefficients [N, c] and number [N] int64 of the code with the least squared error.

        In float32 at least: errors of two codes often differ by less than half precision can say, and wrong choices
        cost 0.2 dB.
        """
        with no_autocast(x.device):
            x, encoder, mean = at_least_float32(x), at_least_float32(self.encoder), at_least_float32(self.mean)
            every = _project(x, encoder, mean)
            with torch.no_grad():
                # |x - m - D^T z|^2 expanded, so that no reconstruction [N, K, F] is ever built.
                decoder = at_least_float32(self.decoder)
                projected = _project(x, decoder, mean)
                gram = decoder @ decoder.transpose(1, 2)
                quadratic = (torch.einsum("nkc,kcd->nkd", every, gram) * every).sum(dim=-1)
                distance = mean.square().sum(dim=-1) - 2 * x @ mean.T
                best = (distance - 2 * (every * projected).sum(dim=-1) + quadratic).argmin(dim=1)
            chosen = every.gather(1, best[:, None, None].expand(-1, 1, every.shape[2]))[:, 0]
        return chosen.to(self.encoder.dtype), best


_Part = Callable[[LinearCodes, Tensor, Tensor, Tensor | None], Tensor]
"""Codes, which of them tokens have [N, K], coefficients in place [N, K, c], and patches [N, F] or None -> [N, F]."""


def _project(x: Tensor, rows: Tensor, mean: Tensor) -> Tensor:
    """R_k (x - m_k) for x [N, F], rows R [K, c, F] and means m [K, F] -> [N, K, c]."""
    codes, channels, features = rows.shape
    product = (x @ rows.reshape(-1, features).T).unflatten(1, (codes, channels))
    projection: Tensor = product - (rows * mean[:, None]).sum(dim=-1)
    return projection


class CodeLinks(nn.Module):
    """What coefficients are to the transformers: reads [K, c, D] and biases [K, D], writes [K, c, E].

    The decoder's transformer gets sum_i z_i reads[k, i] + biases[k] of a token with code k; the encoder's features h
    [E] change coefficient i by writes[k, i] . correct(h), where `correct` is a linear layer.
    """

    def __init__(self, codes: int, channels: int, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.reads = nn.Parameter(torch.zeros(codes, channels, decoder_width))
        self.biases = nn.Parameter(torch.zeros(codes, decoder_width))
        self.writes = nn.Parameter(torch.zeros(codes, channels, encoder_width))
        self.correct = nn.Linear(encoder_width, encoder_width, bias=False)

    def changes(self, features: Tensor, number: Tensor) -> Tensor:
        """What features [N, E] change in the coefficients of tokens with codes `number` [N] -> [N, c]."""
        every: Tensor = (self.correct(features) @ self.writes.flatten(0, 1).T).unflatten(1, self.writes.shape[:2])
        chosen: Tensor = every.gather(1, number[:, None, None].expand(-1, 1, every.shape[2]))[:, 0]
        return chosen


class PiecewiseLinearCode(nn.Module):
    """Codes for single frames and codes for clips, numbered one after the other.

    A token whose later frames are exactly zero carries a single frame (FORMAT 2: stills; FORMAT 11: voxels) and is
    coded by a code of single frames, which says nothing about the later ones.

    Args:
        frame_features: features of the first frame of a patch.
        patch_features: features of a whole patch.
        latent_channels: C.
        still_codes / clip_codes: how many codes of each sort.
        in_digits: write coefficients as digits for FSQ of 4 levels (`tokenizer.model.digits`), not as numbers.
        widths: of the encoder and the decoder, to link them with the codes.
        consistent: whether decoded patches are made consistent with the coefficients. Digits are too coarse for it:
            with `in_digits` nothing is taken out.
    """

    write_levels: Tensor
    read_levels: Tensor

    def __init__(
        self,
        frame_features: int,
        patch_features: int,
        latent_channels: int,
        still_codes: int,
        clip_codes: int,
        *,
        in_digits: bool = False,
        widths: tuple[int, int] | None = None,
        consistent: bool = False,
    ) -> None:
        super().__init__()
        self.in_digits = in_digits
        self.consistent = consistent and not in_digits
        self.frame_features = frame_features
        self.total = still_codes + clip_codes
        self.digits = max(1, math.ceil(math.log(self.total, BASE) - 1e-9))
        channels = latent_channels - self.digits
        self.stills = LinearCodes(still_codes, channels, frame_features)
        self.clips = LinearCodes(clip_codes, channels, patch_features)
        self.links = CodeLinks(self.total, channels, *widths) if widths is not None else None
        self.logvar = nn.Parameter(torch.zeros(latent_channels))
        self.register_buffer("write_levels", torch.tensor(LEVELS))
        self.register_buffer("read_levels", torch.tensor(LEVEL_VALUES if in_digits else LEVELS))

    def add_to_parameters(self, parameters: Tensor, patches: Tensor, features: Tensor | None = None) -> Tensor:
        """Add the code of patches [N, P] to the encoder's posterior parameters [N, 2C].

        Digit channels belong to the code alone: whatever the encoder says there is replaced. That holds for every
        channel of a code in digits, where a small correction would flip a strong digit.

        Args:
            features: [N, E] of the encoder, for codes that are linked with it.
        """
        still = (patches[:, self.frame_features :] == 0).all(dim=1)
        code, number = self._codes_of(patches, still)
        digits = torch.stack([number // BASE**i % BASE for i in range(self.digits)], dim=1)
        mean, logvar = parameters.chunk(2, dim=1)
        rest = code if self.in_digits else mean[:, self.digits :] + code
        if self.links is not None and features is not None and not self.in_digits:
            rest = rest + self.links.changes(features, number)
        mean = torch.cat([self.write_levels.to(mean.dtype)[digits], rest.to(mean.dtype)], dim=1)
        fixed = self.logvar.to(logvar.dtype)
        logvar = torch.cat(
            [fixed[: self.digits].expand(len(logvar), -1), logvar[:, self.digits :] + fixed[self.digits :]], dim=1
        )
        return torch.cat([mean, logvar], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """The linear part of the patches, [N, C] -> [N, P]."""
        return self._of_both_sorts(latents, None, lambda codes, chosen, slots, _: _reconstruct(codes, chosen, slots))

    def made_consistent(self, patches: Tensor, latents: Tensor) -> Tensor:
        """Decoded patches [N, P], changed where coding them again would give other coefficients than latents [N, C].

        With code k and coefficients z, patch x becomes x + D_k^T (z - E_k (x - m_k)); of stills, their frame alone.
        """
        return patches + self._of_both_sorts(latents, patches, _missing) if self.consistent else patches

    def _of_both_sorts(self, latents: Tensor, patches: Tensor | None, part: _Part) -> Tensor:
        """`part` of the codes of stills and of clips, each for its tokens: [N, P], zero in later frames of stills."""
        chosen, slots = self._slots(latents)
        stills = len(self.stills.mean)

        def of(codes: LinearCodes, tokens: Tensor | slice) -> Tensor:
            mine = slice(stills) if codes is self.stills else slice(stills, None)
            seen = None if patches is None else patches[tokens, : codes.mean.shape[1]]
            return part(codes, chosen[tokens, mine], slots[tokens, mine], seen)

        if (rows := _apart(chosen[:, :stills].sum(dim=1) > 0)) is not None:
            return _in_order([self._padded(of(self.stills, rows[0])), of(self.clips, rows[1])], rows)
        return of(self.clips, slice(None)) + self._padded(of(self.stills, slice(None)))

    def read(self, latents: Tensor) -> Tensor | None:
        """What the decoder's transformer reads besides, [N, C] -> [N, D]; None for codes that are not linked."""
        if self.links is None:
            return None
        chosen, slots = self._slots(latents)
        return slots.flatten(1) @ self.links.reads.flatten(0, 1) + chosen @ self.links.biases

    def is_still(self, latents: Tensor) -> Tensor:
        """bool [N]: tokens [N, C] that carry a single frame."""
        return self._numbers(latents) < len(self.stills.mean)

    def _numbers(self, latents: Tensor) -> Tensor:
        """[N, C] -> number of each token's code, [N]."""
        distance = (latents[:, : self.digits, None] - self.read_levels.to(latents.dtype)).abs()
        digits = distance.argmin(dim=-1)
        number = sum(digits[:, i] * BASE**i for i in range(self.digits))
        assert isinstance(number, Tensor)
        return number.clamp_max(self.total - 1)

    def _slots(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Which code each token has, one-hot [N, K], and its coefficients in that code's place [N, K, c].

        So one dense product serves all tokens without sorting.
        """
        chosen = torch.nn.functional.one_hot(self._numbers(latents), self.total).to(latents.dtype)
        return chosen, chosen[:, :, None] * latents[:, None, self.digits :]

    def _codes_of(self, patches: Tensor, still: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients [N, c] of patches [N, P] and numbers of their codes [N]; still: bool [N]."""
        frame, first_clip = self.frame_features, len(self.stills.mean)
        if (rows := _apart(still)) is not None:
            (code, number), (clip_code, clip_number) = (
                self._code(self.stills, patches[rows[0], :frame]),
                self._code(self.clips, patches[rows[1]]),
            )
            return _in_order([code, clip_code], rows), _in_order([number, clip_number + first_clip], rows)
        still_code, still_number = self._code(self.stills, patches[:, :frame])
        clip_code, clip_number = self._code(self.clips, patches)
        number = torch.where(still, still_number, clip_number + first_clip)
        return torch.where(still[:, None], still_code, clip_code), number

    def _padded(self, frames: Tensor) -> Tensor:
        """[N, P / Pt] of the first frame -> [N, P]."""
        return torch.nn.functional.pad(frames, (0, self.clips.mean.shape[1] - self.frame_features))

    def _code(self, codes: LinearCodes, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [N, c] of the best of `codes` for each row, and its number [N]."""
        if not self.in_digits:
            return codes(x)  # type: ignore[no-any-return]
        with no_autocast(x.device):
            full = (at_least_float32(part) for part in (x, codes.decoder, codes.mean))
            digits, number = code_in_digits(*full)
        return self.write_levels.to(codes.decoder.dtype)[digits], number


def _reconstruct(codes: LinearCodes, chosen: Tensor, slots: Tensor) -> Tensor:
    """m_k + D_k^T z for one-hot codes [N, K] and coefficients in their code's place [N, K, c] -> [N, F]."""
    return slots.flatten(1) @ codes.decoder.flatten(0, 1) + chosen @ codes.mean


def _missing(codes: LinearCodes, chosen: Tensor, slots: Tensor, x: Tensor | None) -> Tensor:
    """D_k^T (z - E_k (x - m_k)) for x [N, F] and the rest as for `_reconstruct` -> [N, F]."""
    assert x is not None
    found = _project(x, codes.encoder, codes.mean) * chosen[:, :, None]
    change: Tensor = (slots - found).flatten(1) @ codes.decoder.flatten(0, 1)
    return change


def make_skip(config: ATokenConfig) -> PiecewiseLinearCode | None:
    """The codes that a network of these sizes has beside its transformers, if any."""
    if config.skip is None:
        return None
    decoder_width = config.decoder.width if config.decoder is not None else config.encoder.width
    return PiecewiseLinearCode(
        config.patch_features // config.patch_size[0],
        config.patch_features,
        config.latent_channels,
        config.skip.still_codes,
        config.skip.clip_codes,
        in_digits=config.quantizer is not None,
        widths=(config.encoder.width, decoder_width) if config.skip.linked else None,
        consistent=config.skip.consistent,
    )


def _apart(still: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rows of single frames and of clips, where they are worth computing alone (`host_rows`)."""
    stills, clips = host_rows(still), host_rows(~still)
    return None if stills is None or clips is None else (stills, clips)


def _in_order(parts: list[Tensor], rows: tuple[Tensor, Tensor]) -> Tensor:
    """Rows of two parts where they belong; a batch of one sort is in order already."""
    if not (len(rows[0]) and len(rows[1])):
        return parts[0] if len(rows[0]) else parts[1]
    return torch.cat(parts).index_select(0, torch.argsort(torch.cat(rows)))
