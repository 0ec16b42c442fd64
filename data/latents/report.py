"""What one run of `atoken tokenize` tells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUARANTINE = "quarantine.jsonl"
"""File in the folder of the set that names broken samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a run of one process did, and how the set stands.

    complete: every shard is there, and so is the manifest. shards, samples: of the whole set, once it is complete.
    written: shards that this process wrote. encoded: samples and tokens of these. seconds: for them.
    causes: broken samples by cause, in the shards of this process and run.
    """

    out: str
    model: str
    fingerprint: str
    complete: bool
    shards: int
    samples: int
    written: int
    encoded_samples: int
    encoded_tokens: int
    seconds: float
    causes: dict[str, int]

    @property
    def tokens_per_second(self) -> float:
        """Of this process; 0 where there was nothing to do."""
        return self.encoded_tokens / self.seconds if self.encoded_tokens else 0.0

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "out": self.out,
            "model": self.model,
            "latent_space": self.fingerprint,
            "complete": self.complete,
            "shards": self.shards,
            "samples": self.samples,
            "written": self.written,
            "encoded_samples": self.encoded_samples,
            "encoded_tokens": self.encoded_tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "skipped": self.causes,
        }

    def as_text(self) -> str:
        """For people."""
        lines = [f"{self.out}: nothing was left to do"]
        if self.written:
            lines = [
                f"{self.out}: {self.encoded_samples} samples in {self.written} shards, {self.encoded_tokens} tokens, "
                f"{self.seconds:.1f} s, {self.tokens_per_second:.0f} tokens/s"
            ]
        if self.causes:
            told = ", ".join(f"{cause}: {count}" for cause, count in self.causes.items())
            lines.append(f"left out: {told}; named in {Path(self.out) / QUARANTINE}")
        if self.complete:
            lines.append(f"complete: {self.samples} samples in {self.shards} shards, latents of {self.model}")
        else:
            lines.append("not complete yet: other processes have shards left to write")
        return "\n".join(lines)
