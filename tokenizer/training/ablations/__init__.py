"""Ablations: runs that differ in one thing, from committed files, and a report of what was measured.

    python -m tokenizer.training.ablations --out runs/ablations --docs docs/ablations

A study (`plan`) is a few runs, each a `RunConfig` file with a few settings changed, and variants that are compared. The
command trains every run that is not there yet in a process of its own, as `atoken train` does (`running`), measures
(`perception`, `curves`) and writes tables and plots (`report`).
"""
