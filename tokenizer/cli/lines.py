"""Results as lines for people."""

from __future__ import annotations

from typing import Any

from tokenizer.cli.outcome import Result


def encoded_line(result: Result) -> str:
    return (
        f"{result['source']} -> {result['out']}: {result['tokens']} tokens, {result['bytes']} bytes, "
        f"{result['seconds']:.2f} s"
    )


def decoded_line(result: Result) -> str:
    if result["kind"] == "asset":
        return f"{result['source']} -> {result['out']}: {result['gaussians']} Gaussians, {result['seconds']:.2f} s"
    size = f"{result['width']}x{result['height']}" + (f", {result['frames']} frames" if result["frames"] > 1 else "")
    return f"{result['source']} -> {result['out']}: {size}, {result['seconds']:.2f} s"


def reconstructed_line(result: Result) -> str:
    if result["kind"] == "asset":
        return (
            f"{result['source']} -> {result['out']}: {result['tokens']} tokens, {result['bits'] / 8e3:.1f} kB, "
            f"{result['gaussians']} Gaussians, PSNR {result['psnr']:.2f} dB and SSIM {result['ssim']:.4f} on "
            f"{result['views']} views, {result['seconds']:.2f} s"
        )
    return (
        f"{result['source']} -> {result['out']}: {result['tokens']} tokens, {result['bits_per_pixel']:.3f} bits/pixel, "
        f"PSNR {result['psnr']:.2f} dB, SSIM {result['ssim']:.4f}, {result['seconds']:.2f} s"
    )


def nested_lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    """Nested facts as indented lines."""
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *nested_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return lines
