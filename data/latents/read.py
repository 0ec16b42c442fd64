"""Tokenised sets through the same loader as any other: samples whose pixels are latents already."""

from __future__ import annotations

from dataclasses import dataclass

from data.latents.format import LatentItem, decode_latents
from data.mixture import Task
from data.samples import Item, Raw, SampleError
from data.text import clean_caption
from tokenizer.errors import InputError

__all__ = ["LatentDecoder", "LatentItem", "decode_latents"]

_ODD_TEXT = "damaged caption or facts"


@dataclass(frozen=True, slots=True)
class LatentDecoder:
    """A sample of a tokenised set -> an `Item` with `latents`; what a `Feed` decodes with.

    source: name of the source in the mixture.
    task: what it is used for.
    fingerprint: of the latent space that is expected; any by default.
    clean: captions as the text tower reads them (FORMAT 12); needs the package ftfy.
    """

    source: str
    task: Task
    fingerprint: str = ""
    clean: bool = True

    def __call__(self, raw: Raw, epoch: int) -> Item:  # noqa: ARG002 - latents are the same in every epoch
        """Decode one sample.

        Raises:
            SampleError: "damaged latents", "other latent space" than the one expected, or "damaged caption or facts".
        """
        latents = decode_latents(raw)
        if self.fingerprint and latents.fingerprint != self.fingerprint:
            raise SampleError(
                "other latent space",
                f"{raw.id}: made by '{latents.model}' ({latents.fingerprint}), not in the space {self.fingerprint}",
            )
        try:
            caption, facts = raw.caption(), raw.facts()
        except InputError as error:
            raise SampleError(_ODD_TEXT, str(error)) from None
        if caption is not None and self.clean:
            caption = clean_caption(caption) or None
        return Item(
            id=raw.id,
            source=self.source,
            task=self.task,
            tokens=len(latents.positions),
            latents=latents,
            caption=caption,
            facts=facts,
        )
